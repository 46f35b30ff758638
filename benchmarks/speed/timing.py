"""Side-by-side timing: all contenders in one process, alternately, in an order that changes from round to round."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SHORT = 0.02
"""Seconds; a call that takes less is repeated to reach it, within one timing."""

LONG = 1.0
"""Seconds; a call that takes longer does not depend on what the caches held before."""

LEAST = 3
"""Rounds, whatever they take."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one contender, one number a round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Timing) -> tuple[float, float, float]:
        """(median, lower quartile, upper quartile) of the ratio to another, round by round."""
        ratios = [mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return middle, low, high


def alternate(
    calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float = math.inf, seed: int = 0
) -> dict[str, Timing]:
    """Time every call once a round, right after the same call untimed, which brings its data into the caches.

    Every call was made once before. Long calls are timed without another.

    Args:
        rounds: at most so many,
        seconds: and none that begins later than this, but three at least.
    """
    lengths = {name: _timed(call, 1) for name, call in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(seed).shuffle
    began = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST and time.perf_counter() - began > seconds:
            break
        shuffle(order)
        for name in order:
            if lengths[name] < LONG:
                calls[name]()
            taken[name].append(_timed(calls[name], max(1, math.ceil(SHORT / lengths[name]))))
    return {name: Timing(values) for name, values in taken.items()}


def _timed(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
