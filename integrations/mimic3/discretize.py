"""Irregular measurements to hourly features. Every statistic comes from the training episodes.

Legend: N episodes, V variables, F features, M measurements; 48 hours from admission.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HOURS = 48
QUANTILES = (0.001, 0.999)
"""Numbers outside these quantiles of the training episodes are clipped: typing errors such as a pH of 735."""


def hourly(
    episode: NDArray[np.integer],
    hours: NDArray[np.floating],
    variable: NDArray[np.integer],
    value: NDArray[np.floating],
    shape: tuple[int, int],
) -> NDArray[np.float32]:
    """The last value of every variable in every hour: [N, 48, V], NaN where nothing was measured.

    Args:
        episode, variable: [M] indices.
        hours: [M] since admission, in any order; of equal times the later row counts. Hour h holds h ≤ t < h + 1,
            the last one t = 48 too. What was measured before admission or after 48 hours is left out.
        value: [M]; NaN counts as not measured.
        shape: (N, V).
    """
    episodes, variables = shape
    kept = (hours > -1e-6) & (hours < HOURS + 1e-6) & ~np.isnan(value)
    order = np.flatnonzero(kept)
    order = order[np.argsort(hours[order], kind="stable")]
    hour = np.clip(np.floor(hours[order]), 0, HOURS - 1).astype(np.int64)
    cell = (episode[order].astype(np.int64) * HOURS + hour) * variables + variable[order]
    cells, last = np.unique(cell[::-1], return_index=True)  # the first of a reversed list is the latest
    grid = np.full(episodes * HOURS * variables, np.nan, dtype=np.float32)
    grid[cells] = value[order][::-1][last]
    return grid.reshape(episodes, HOURS, variables)


def forward_fill(grid: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, 48, V] with every gap filled by the value before it; NaN stays before the first measurement."""
    latest = np.where(np.isnan(grid), 0, np.arange(grid.shape[1], dtype=np.int16)[None, :, None])
    np.maximum.accumulate(latest, axis=1, out=latest)
    return np.take_along_axis(grid, latest.astype(np.int64), axis=1)


@dataclass(frozen=True)
class Scaling:
    """How a grid becomes features, learned from the grid [N, 48, V] of the training episodes.

    The statistics are over the hours in which a variable was measured. Features, in this order:
        numbers: clipped, standardized, filled forward; 0, the training mean, before the first measurement;
        categories: one 0/1 feature for each value that occurs in training, filled forward; all 0 before the first
            measurement and for a value that training does not know;
        masks: for each variable, whether it was measured in that hour.
    """

    names: tuple[str, ...]
    categorical: tuple[str, ...]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    categories: tuple[tuple[float, ...], ...]

    @classmethod
    def fit(cls, grid: NDArray[np.float32], names: Sequence[str], categorical: Sequence[str]) -> Scaling:
        """Statistics of the training grid. A variable that training never measures is 0 everywhere, and masked."""
        numbers = np.full((4, len(names)), np.nan, dtype=np.float64)
        categories: list[tuple[float, ...]] = []
        for column, name in enumerate(names):
            values = grid[..., column][~np.isnan(grid[..., column])].astype(np.float64)
            if name in categorical:
                categories.append(tuple(np.unique(values).tolist()))
            elif values.size:
                low, high = np.quantile(values, QUANTILES)
                clipped = values.clip(low, high)
                numbers[:, column] = low, high, clipped.mean(), clipped.std() or 1.0
        return cls(tuple(names), tuple(categorical), *numbers.astype(np.float32), tuple(categories))

    @property
    def feature_names(self) -> list[str]:
        """F names: of numbers, of categories as "name=value", of masks as "name measured"."""
        categories = zip((n for n in self.names if n in self.categorical), self.categories, strict=True)
        return [
            *(name for name in self.names if name not in self.categorical),
            *(f"{name}={value:g}" for name, values in categories for value in values),
            *(f"{name} measured" for name in self.names),
        ]

    def __call__(self, grid: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features [N, 48, F], without NaN, of a grid [N, 48, V]."""
        filled = forward_fill(grid)
        number = np.array([name not in self.categorical for name in self.names])
        scaled = (filled.clip(self.low, self.high) - self.mean) / self.std
        parts = [np.nan_to_num(scaled[..., number])]
        for column, values in zip(np.flatnonzero(~number), self.categories, strict=True):
            parts.append((filled[..., column, None] == np.array(values, dtype=np.float32)).astype(np.float32))
        parts.append((~np.isnan(grid)).astype(np.float32))
        return np.concatenate(parts, axis=-1)
