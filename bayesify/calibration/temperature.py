"""One temperature for all members, fitted after training."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bayesify.errors import DataError
from bayesify.evaluation.collect import collect_labeled
from bayesify.predictive import Predictive

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

RANGE = (0.05, 20.0)
_STEPS = 40
_SHRINK = (math.sqrt(5) - 1) / 2


def fit_temperature(bnn: BayesianModel, loader: Iterable[Any], *, samples: int | None = None, seed: int = 0) -> float:
    """Set the temperature of a model; see `BayesianModel.fit_temperature`."""
    before = bnn.temperature
    try:
        bnn.temperature = 1.0
        predictive, labels = collect_labeled(bnn, loader, samples=samples, seed=seed, progress=False)
        if not predictive.has_classes:
            raise DataError(f"a temperature divides logits; the outputs of this {predictive.task} are values.")
        temperature = best_temperature(predictive, labels)
    except BaseException:
        bnn.temperature = before
        raise
    bnn.temperature, bnn.conformal = temperature, None
    return temperature


def best_temperature(predictive: Predictive, labels: Any) -> float:
    """The T with the lowest NLL of the mixture of all members' and samples' outputs / T, by golden section on log T.

    Raises:
        DataError: the NLL is not finite.
    """

    def nll(log_t: float) -> float:
        return float(Predictive(predictive.outputs / math.exp(log_t), predictive.task).nll(labels))

    if not math.isfinite(plain := nll(0.0)):
        raise DataError(f"the NLL of the labels is {plain}: outputs or inputs are not finite.")
    low, high = (math.log(end) for end in RANGE)
    left, right = high - _SHRINK * (high - low), low + _SHRINK * (high - low)
    at_left, at_right = nll(left), nll(right)
    for _ in range(_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _SHRINK * (high - low)
            at_left = nll(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _SHRINK * (high - low)
            at_right = nll(right)
    return math.exp((low + high) / 2)
