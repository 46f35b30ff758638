"""A model's image preprocessing in two parts: resizing and cropping, and what makes a tensor of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesify.data import Preprocessing
from bayesify.data.transforms import ProcessorTransform, TimmTransform, to_channels

if TYPE_CHECKING:
    from PIL.Image import Image

TOLERANCE = 0.05  # of normalized values: about three of 255 levels of rounding


@dataclass(frozen=True)
class Stages:
    """Preprocessing that can be entered before or after resizing and cropping.

    Args:
        whole: RGB image to input tensor.
        crop: RGB image to RGB image of the model's input size; None if the preprocessing cannot be divided.
        rest: what `crop` gives to input tensor.
    """

    whole: Callable[[Image], Tensor]
    crop: Callable[[Image], Image] | None
    rest: Callable[[Image], Tensor]

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> Stages:
        """The parts of an image preprocessing, tried on an image: both ways must give the same input."""
        whole = preprocessing.eval_transform()  # type: ignore[reportAttributeAccessIssue]
        try:
            crop, rest = _divide(whole)
            image = _photograph()
            if torch.allclose(whole(image), rest(crop(image)), atol=TOLERANCE):
                return cls(whole, crop, rest)
        except Exception:  # image processors raise whatever an option they do not know leads to
            return cls(whole, None, whole)
        return cls(whole, None, whole)

    def smaller(self, image: Image) -> tuple[Image, bool]:
        """The one with fewer pixels of `image` and what is left of it after `crop`; and whether it is cropped."""
        if self.crop is None:
            return image, False
        cropped = self.crop(image)
        is_smaller = cropped.width * cropped.height < image.width * image.height
        return (cropped, True) if is_smaller else (image, False)

    def finish(self, image: Image, cropped: bool) -> Tensor:
        return self.rest(image) if cropped else self.whole(image)


def _divide(whole: Any) -> tuple[Callable[[Image], Image], Callable[[Image], Tensor]]:
    from torchvision.transforms import Compose

    if isinstance(whole, ProcessorTransform):
        return _ProcessorCrop(whole.processor), _ProcessorRest(whole.processor, whole.channels)
    steps: list[Any] = whole.transform.transforms
    value, count = steps[0](_photograph()), 0
    while not isinstance(value, Tensor):
        count += 1
        value = steps[count](value)
    return Compose(steps[:count]), TimmTransform(Compose(steps[count:]), whole.channels)


@dataclass(frozen=True)
class _ProcessorCrop:
    processor: Any

    def __call__(self, image: Image) -> Image:
        from PIL import Image as PILImage

        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        pixels = torch.as_tensor(self.processor(images=image, **options)["pixel_values"][0])
        return PILImage.fromarray(pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


@dataclass(frozen=True)
class _ProcessorRest:
    processor: Any
    channels: int

    def __call__(self, image: Image) -> Tensor:
        options = {"do_resize": False, "do_center_crop": False, "return_tensors": "pt"}
        return torch.as_tensor(self.processor(images=to_channels(image, self.channels), **options)["pixel_values"][0])


def _photograph() -> Image:
    """A smooth picture of 800×640, larger than most models' inputs."""
    import numpy as np
    from PIL import Image as PILImage

    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return PILImage.fromarray(noise).resize((800, 640), PILImage.Resampling.BICUBIC)
