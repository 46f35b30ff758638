"""Picklable image transforms: PIL image in, tensor [C, H, W] out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

CROP_SCALE = (0.6, 1.0)
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def to_channels(image: Image, channels: int) -> Image:
    """`image` as grayscale (1), RGB (3) or RGBA (4) with 8 bits a channel."""
    import numpy as np
    from PIL import Image as PILImage

    if image.mode == "I" or image.mode.startswith("I;16"):
        # PIL clips 16-bit grayscale at 255, which turns the picture white.
        image = PILImage.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("P", "PA", "LA", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(MODES[channels])


@dataclass(frozen=True)
class TimmTransform:
    """Channels as the model takes them, then a transform of timm."""

    transform: Callable[[Image], Tensor]
    channels: int

    def __call__(self, image: Image) -> Tensor:
        return self.transform(to_channels(image, self.channels))


@dataclass(frozen=True)
class ProcessorTransform:
    """A random crop, flip and change of colors (in training), then a Hub image processor."""

    processor: Any
    channels: int = 3
    training: bool = False
    color_jitter: float = 0.0

    def __call__(self, image: Image) -> Tensor:
        from torchvision.transforms import ColorJitter, RandomResizedCrop
        from torchvision.transforms import functional as F

        image = to_channels(image, self.channels)
        if self.training:
            # Cropped without resizing: the processor resizes as it does in evaluation.
            top, left, height, width = RandomResizedCrop.get_params(image, list(CROP_SCALE), [0.75, 4 / 3])  # type: ignore[reportArgumentType]
            image = F.crop(image, top, left, height, width)  # type: ignore[reportArgumentType,reportAssignmentType]
            if torch.rand(()) < 0.5:
                image = F.hflip(image)  # type: ignore[reportArgumentType,reportAssignmentType]
            if self.color_jitter:
                image = ColorJitter(*[self.color_jitter] * 3)(image)
        return torch.as_tensor(self.processor(images=image, return_tensors="pt")["pixel_values"][0])
