"""The three kinds of inputs: images as timm takes them, images and texts as transformers takes them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from bayesify.data.columns import Kind
from bayesify.data.transforms import CROP_SCALE, MODES, ProcessorTransform, TimmTransform
from bayesify.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image

Batch = tuple[Tensor, ...] | dict[str, Tensor]


@dataclass(frozen=True)
class ImagePreprocessing:
    """Images as a timm model takes them.

    Args:
        input_size: (C, H, W).
        interpolation, crop_pct, crop_mode: how evaluation resizes and crops, in timm's words.
        mean, std: one number a channel, for pixels between 0 and 1.
        as_dict: batches are dicts with `pixel_values`, as transformers models take them, instead of tuples.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    crop_mode: str = "center"
    as_dict: bool = False
    kind: ClassVar[Kind] = "image"

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        size, channels = self.input_size, self.input_size[0] if self.input_size else 0
        if len(size) != 3 or channels not in MODES or not all(isinstance(n, int) and n > 0 for n in size):
            raise ConfigError(f"input_size must be (1, 3 or 4 channels, height, width); found {size}.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != channels or not all(_finite(v) and (name == "mean" or v > 0) for v in values):
                raise ConfigError(f"{name} must hold {channels} numbers, one a channel; found {values}.")
        if not _finite(self.crop_pct) or not 0.0 < self.crop_pct <= 1.0:
            raise ConfigError(f"crop_pct must lie in (0, 1]; found {self.crop_pct!r}.")
        known = {
            "interpolation": ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming", "random"),
            "crop_mode": ("center", "squash", "border"),
            "as_dict": (True, False),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {choices}; found {getattr(self, name)!r}.")

    def eval_transform(self) -> Callable[[Image], Tensor]:
        """PIL image to [C, H, W]: resize, crop, normalize."""
        from timm.data import create_transform  # type: ignore[reportPrivateImportUsage]

        return TimmTransform(create_transform(is_training=False, **self._options()), self.input_size[0])  # type: ignore[reportArgumentType]

    def train_transform(self, color_jitter: float = 0.0) -> Callable[[Image], Tensor]:
        """PIL image to [C, H, W]: mild random crop, flip and (if asked for) change of colors, normalize."""
        from timm.data import create_transform  # type: ignore[reportPrivateImportUsage]

        augmentation = {"scale": CROP_SCALE, "color_jitter": color_jitter or None}
        transform = create_transform(is_training=True, **augmentation, **self._options())
        return TimmTransform(transform, self.input_size[0])  # type: ignore[reportArgumentType]

    def collate(self, inputs: list[Tensor], labels: list[int] | None) -> Batch:
        """`(pixel_values [B, C, H, W], labels [B])`, or the same as a dict."""
        return _pixel_batch(inputs, labels, self.as_dict)

    def to_dict(self) -> dict[str, Any]:
        return {"type": "image", **asdict(self)}

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write what `to_dict` does not hold into `folder` (nothing, here) and return `to_dict()`."""
        return self.to_dict()

    def _options(self) -> dict[str, Any]:
        return {
            "input_size": self.input_size,
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }


@dataclass(frozen=True)
class HubImagePreprocessing:
    """Images as a transformers model takes them: its `AutoImageProcessor`; training crops, flips first."""

    processor: Any
    channels: int = 3
    kind: ClassVar[Kind] = "image"

    def __post_init__(self) -> None:
        if self.channels not in MODES:
            raise ConfigError(f"channels must be 1, 3 or 4; found {self.channels!r}.")

    def eval_transform(self) -> Callable[[Image], Tensor]:
        return ProcessorTransform(self.processor, self.channels)

    def train_transform(self, color_jitter: float = 0.0) -> Callable[[Image], Tensor]:
        return ProcessorTransform(self.processor, self.channels, training=True, color_jitter=color_jitter)

    def collate(self, inputs: list[Tensor], labels: list[int] | None) -> Batch:
        """`{"pixel_values": [B, C, H, W], "labels": [B]}`."""
        return _pixel_batch(inputs, labels, as_dict=True)

    def to_dict(self) -> dict[str, Any]:
        return {"type": "hub-image", "channels": self.channels}

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write the processor's file into `folder` and return `to_dict()`."""
        self.processor.save_pretrained(str(folder))
        return self.to_dict()


@dataclass(frozen=True)
class TextPreprocessing:
    """Texts, or pairs of texts, as token ids: at most `max_length`, padded to the longest of the batch."""

    tokenizer: Any
    max_length: int = 128
    pair: bool = False
    kind: ClassVar[Kind] = "text"

    def __post_init__(self) -> None:
        if type(self.max_length) is not int or self.max_length < 1:
            raise ConfigError(f"max_length must be a positive whole number; found {self.max_length!r}.")
        if type(self.pair) is not bool:
            raise ConfigError(f"pair must be true or false; found {self.pair!r}.")

    def __call__(self, text: str, text_pair: str | None = None) -> dict[str, list[int]]:
        return dict(self.tokenizer(text, text_pair, truncation=True, max_length=self.max_length))

    def collate(self, inputs: list[dict[str, list[int]]], labels: list[int] | None) -> Batch:
        """`{"input_ids": [B, T], "attention_mask": [B, T], ..., "labels": [B]}`; T is the batch's longest."""
        from transformers import DataCollatorWithPadding

        batch: dict[str, Tensor] = dict(DataCollatorWithPadding(self.tokenizer)(inputs))
        return batch if labels is None else {**batch, "labels": torch.tensor(labels)}

    def to_dict(self) -> dict[str, Any]:
        return {"type": "text", "max_length": self.max_length, "pair": self.pair}

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write the tokenizer's files into `folder` and return `to_dict()`."""
        self.tokenizer.save_pretrained(str(folder))
        return self.to_dict()


def _pixel_batch(inputs: list[Tensor], labels: list[int] | None, as_dict: bool) -> Batch:
    pixels = torch.stack(inputs)
    if as_dict:
        return {"pixel_values": pixels} if labels is None else {"pixel_values": pixels, "labels": torch.tensor(labels)}
    return (pixels,) if labels is None else (pixels, torch.tensor(labels))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
