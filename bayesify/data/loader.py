"""Prepared examples and batches whose randomness depends on seed, epoch and row alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from bayesify.data.columns import column_values
from bayesify.data.inputs import Batch, TextPreprocessing
from bayesify.data.preprocessing import Preprocessing
from bayesify.data.seeding import seed_of, seeded
from bayesify.errors import BayesifyError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from bayesify.data.splits import Splits


class PreparedDataset(TorchDataset):
    """Rows of a data set as a model takes them; item `index` is (input, label or None).

    The augmentation of an item is a function of (seed, epoch, index): the same in every worker and
    process and in any order, so an interrupted run goes on exactly. Call `set_epoch` before each epoch.

    Args:
        dataset: a `datasets.Dataset`.
        preprocessing: how a row becomes an input; training augments images.
        input_column, text_pair_column, label_column: `label_column=None` (or absent) means no labels.
        num_classes: the classes of the model; labels must lie in 0 … num_classes − 1.
        color_jitter: strength of the random change of colors in training.

    Raises:
        DataError: a column is missing, or a label is missing or out of range; the message names the row.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocessing: Preprocessing,
        input_column: str,
        label_column: str | None = None,
        *,
        num_classes: int | None = None,
        text_pair_column: str | None = None,
        training: bool = False,
        seed: int = 0,
        color_jitter: float = 0.0,
    ) -> None:
        for column in (input_column, text_pair_column):
            if column is not None and column not in dataset.column_names:
                raise DataError(f"there is no column {column!r}; columns: {', '.join(dataset.column_names)}.")
        self.dataset = dataset
        self.preprocessing = preprocessing
        self.input_column = input_column
        self.text_pair_column = text_pair_column
        self.training = training
        self.seed = seed
        self.epoch = 0
        self.labels: list[int] | None = None
        if label_column is not None and label_column in dataset.column_names:
            self.labels = column_values(dataset, label_column)
        self.num_classes = num_classes if num_classes is not None else max(self.labels or [-1]) + 1
        for row, label in enumerate(self.labels or []):
            if type(label) is not int or not 0 <= label < self.num_classes:
                raise DataError(
                    f"row {row}: label {label!r} in column {label_column!r} is not one of the "
                    f"{self.num_classes} classes (0 to {self.num_classes - 1})."
                )
        if isinstance(preprocessing, TextPreprocessing):
            self._transform = None
        elif training:
            self._transform = preprocessing.train_transform(color_jitter)
        else:
            self._transform = preprocessing.eval_transform()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation and order are drawn; call it before iterating."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int | None]:
        index = range(len(self))[index]  # the randomness of item -1 is that of the last row
        label = self.labels[index] if self.labels is not None else None
        try:
            row = self.dataset[index]
            value = row[self.input_column]
            if value is None:
                raise DataError("the value is missing")
            if self._transform is None:
                pair = row[self.text_pair_column] if self.text_pair_column is not None else None
                return self.preprocessing(value, pair), label  # type: ignore[reportCallIssue]
            if not self.training:
                return self._transform(value), label
            with seeded(self.seed, self.epoch, index):
                return self._transform(value), label
        except Exception as error:  # decoders raise whatever the broken bytes lead to
            reason = str(error) if isinstance(error, BayesifyError) else f"{type(error).__name__}: {error}"
            raise DataError(f"{self._place(index)}: column {self.input_column!r} cannot be read: {reason}") from error

    def _place(self, index: int) -> str:
        """A row in words, with its file if it has one."""
        import datasets

        features = getattr(self.dataset, "features", None) or {}
        if not isinstance(features.get(self.input_column), datasets.Image):
            return f"row {index}"
        encoded = self.dataset.cast_column(self.input_column, datasets.Image(decode=False))[index][self.input_column]
        file = (encoded or {}).get("path")
        return f"row {index}" if file is None else f"row {index} ({file})"

    def collate_fn(self, items: list[tuple[Any, int | None]]) -> Batch:
        """A batch as the model takes it: a tuple for timm, a dict for transformers; labels [B] if any."""
        labels = [label for _, label in items if label is not None]
        return self.preprocessing.collate([value for value, _ in items], labels if self.labels is not None else None)


def prepare(
    splits: Splits,
    name: str,
    preprocessing: Preprocessing,
    *,
    num_classes: int | None = None,
    labels: bool = True,
    training: bool = False,
    seed: int = 0,
    color_jitter: float = 0.0,
) -> PreparedDataset:
    """The split called `name`, prepared; `labels=False` ignores its labels (out-of-distribution data).

    Raises:
        DataError: there is no such split, or the preprocessing is for another kind of data.
    """
    if splits.kind != preprocessing.kind:
        raise DataError(f"the model takes {preprocessing.kind}s; the data set holds {splits.kind}s.")
    return PreparedDataset(
        splits.get(name),
        preprocessing,
        splits.input_column,
        splits.label_column if labels else None,
        num_classes=len(splits.label_names) if num_classes is None else num_classes,
        text_pair_column=splits.text_pair_column,
        training=training,
        seed=seed,
        color_jitter=color_jitter,
    )


def make_loader(
    prepared: PreparedDataset,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """Batches of `prepared`; the order is a function of (seed, `prepared.epoch`).

    Iterating draws nothing from the global random state. Under Accelerate call `set_epoch` of the loader
    it prepared, which passes it on to the data set.
    """
    return DataLoader(
        prepared,
        batch_size=batch_size,
        sampler=_EpochSampler(prepared, seed) if shuffle else None,
        num_workers=workers,
        collate_fn=prepared.collate_fn,
        drop_last=drop_last,
        generator=torch.Generator().manual_seed(seed_of(seed, "workers")),
    )


class _EpochSampler(Sampler[int]):
    """All rows in an order drawn from (seed, epoch of the data set)."""

    def __init__(self, prepared: PreparedDataset, seed: int) -> None:
        self.prepared = prepared
        self.seed = seed

    def __len__(self) -> int:
        return len(self.prepared)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", self.prepared.epoch))
        yield from torch.randperm(len(self.prepared), generator=generator).tolist()
