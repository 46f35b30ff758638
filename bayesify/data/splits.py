"""`Splits`: the parts of one data set and what their columns mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from bayesify.data.columns import Kind, column_values
from bayesify.data.files import canonical_split
from bayesify.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Splits:
    """The splits of one data set; labels mean the same in each of them.

    Args:
        kind: what the input column holds.
        input_column: the image or text column.
        text_pair_column: the second text of a pair (premise and hypothesis, say), if there is one.
        label_column: None if no split has labels; a single split may lack the column.
        label_names: the name of each class, in the order of the labels.
        train, validation, test: None where there is none.
        others: further splits by name, e.g. out-of-distribution data.
    """

    kind: Kind
    input_column: str
    label_column: str | None = None
    label_names: list[str] = field(default_factory=list)
    text_pair_column: str | None = None
    train: Dataset | None = None
    validation: Dataset | None = None
    test: Dataset | None = None
    others: dict[str, Dataset] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Dataset]:
        """The splits that exist, by name."""
        usual = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: data for name, data in usual.items() if data is not None} | self.others

    def get(self, name: str) -> Dataset:
        """The split called `name`; `val`, `valid` and `dev` mean `validation`.

        Raises:
            DataError: there is no such split; the message lists those that exist.
        """
        found = self.named
        for key in (name, canonical_split(name)):
            if key in found:
                return found[key]
        raise DataError(f"the data set has no split {name!r}; its splits: {', '.join(found)}. Choose one of them.")

    def split_validation(self, fraction: float = 0.1, seed: int = 0) -> Splits:
        """These splits, with a share of `train` held out for validation if there is no validation split yet.

        The hold-out depends on `seed` alone, takes the same share of every class, and never takes the only
        example of a class.

        Raises:
            ConfigError: `fraction` does not lie between 0 and 1.
            DataError: there is no train split, or it is too small to give and keep an example.
        """
        if self.validation is not None:
            return self
        if not 0.0 < fraction < 1.0:
            raise ConfigError(f"the validation fraction must lie between 0 and 1; found {fraction}.")
        train = self.get("train")
        labeled = self.label_column is not None and self.label_column in train.column_names
        labels = column_values(train, self.label_column) if labeled and self.label_column else [0] * len(train)
        held_out = _stratified(labels, fraction, seed)
        if not held_out or len(held_out) == len(train):
            raise DataError(
                f"cannot hold out {fraction:g} of {len(train)} training examples for validation; "
                "give a validation split or another fraction."
            )
        kept = sorted(set(range(len(train))) - set(held_out))
        return replace(self, train=train.select(kept), validation=train.select(held_out))


def _stratified(labels: Sequence[int | None], fraction: float, seed: int) -> list[int]:
    """Every (1/fraction)-th row of the rows in order of class, shuffled within each class."""
    import numpy as np

    classes, inverse, counts = np.unique(
        [-1 if y is None else y for y in labels], return_inverse=True, return_counts=True
    )
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    order = order[np.argsort(inverse[order], kind="stable")]
    if len(classes) < len(labels):
        order = order[counts[inverse[order]] > 1]
    take = round(fraction * len(order))
    positions = ((np.arange(take) + generator.random()) * len(order) / max(take, 1)).astype(int)
    return sorted(order[positions].tolist())
