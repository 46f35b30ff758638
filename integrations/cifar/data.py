"""CIFAR in memory: images as one tensor, augmented a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F

from bayesify.data import ImagePreprocessing, Splits, load_data
from bayesify.errors import DataError

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
PADDING = 4
PREPROCESSING = ImagePreprocessing((3, 32, 32), mean=MEAN, std=STD, crop_pct=1.0)
"""The same inputs as those of `Images` in evaluation, to the last bit, from PIL images of 32×32: nothing is resized."""


def load_splits(source: str, label_column: str | None = None) -> Splits:
    """`load_data`; where the Hub's CIFAR-100 leaves a choice of labels, the 100 fine ones."""
    try:
        splits = load_data(source, label_column=label_column)
    except DataError as error:
        if label_column is not None or "fine_label" not in str(error):
            raise
        splits = load_data(source, label_column="fine_label")
    if splits.kind != "image" or splits.label_column is None:
        raise DataError(f"{source} holds no labeled images.")
    return splits


class Images(torch.utils.data.Dataset):
    """Normalized images [3, H, W] and labels, with the usual shifts (padding by 4) and flips in training.

    The augmentation of a row is a function of (seed, epoch, row), so an interrupted run goes on exactly.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        training: bool = False,
        seed: int = 0,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ) -> None:
        self.images, self.labels = images, labels
        self.training, self.seed = training, seed
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.set_epoch(0)

    @classmethod
    def read(cls, dataset: Dataset, image_column: str, label_column: str, **options: Any) -> Images:
        """Decode a whole split into memory (154 MB for 50,000 images)."""
        arrays = [np.asarray(row.convert("RGB")) for row in dataset[image_column]]
        if len({array.shape for array in arrays}) != 1:
            raise DataError(f"images of one size are expected; found {sorted({a.shape for a in arrays})[:3]}.")
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        return cls(images, torch.tensor(dataset[label_column]), **options)

    def set_epoch(self, epoch: int) -> None:
        """Draw the shifts and flips of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        self.shifts = torch.randint(0, 2 * PADDING + 1, (len(self), 2), generator=generator)
        self.flips = torch.rand(len(self), generator=generator) < 0.5

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(rows)
        images = (self.images[index].float() / 255 - self.mean) / self.std
        if self.training:
            images = self._augment(images, index)
        return images, self.labels[index]

    def _augment(self, images: Tensor, index: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = F.pad(images, (PADDING,) * 4)
        rows = self.shifts[index, :1] + torch.arange(height)
        columns = self.shifts[index, 1:] + torch.arange(width)
        columns = torch.where(self.flips[index, None], columns.flip(1), columns)
        batch = torch.arange(len(index))[:, None, None]
        return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def collate_fn(self, batch: Any) -> Any:
        """`__getitems__` has made the batch already."""
        return batch
