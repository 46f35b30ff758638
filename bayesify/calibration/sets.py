"""Sets of classes that hold the true one with a chosen probability: split conformal prediction.

Sources: Romano, Sesia and Candès, "Classification with Valid and Adaptive Coverage", NeurIPS 2020 (APS);
Angelopoulos et al., "Uncertainty Sets for Image Classifiers using Conformal Prediction", ICLR 2021 (RAPS).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesify.config import check_number
from bayesify.errors import ConfigError, DataError
from bayesify.evaluation.collect import collect_labeled
from bayesify.tasks import IGNORED

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

FREE_RANKS = 5
"""Classes that a set may hold before each further one is penalized."""
_ROUNDING = 1e-6
"""Differences of scores that are only how the same probabilities were computed."""


@dataclass(frozen=True)
class Conformal:
    """How unusual each example of a calibration set was under its true class.

    Attributes:
        scores: [n] in increasing order, see `conformity`.
        penalty: of each class beyond the first five.
        samples: draws a member with which the scores were made; None: the posterior mean.
    """

    scores: Tensor
    penalty: float
    samples: int | None

    def __post_init__(self) -> None:
        if self.scores.dim() != 1 or len(self.scores) == 0 or not self.scores.isfinite().all():
            raise DataError(f"scores must be a row of finite numbers; found shape {tuple(self.scores.shape)}.")
        check_number("penalty", self.penalty, "finite and not negative", lambda v: 0.0 <= v < math.inf)

    def sets(self, probs: Tensor, alpha: float) -> Tensor:
        """[B, C] bool: which classes are in the set of each example, for probabilities [B, C]."""
        check_number("alpha", alpha, "in (0, 1)", lambda v: 0.0 < v < 1.0)
        count = len(self.scores)
        rank = math.ceil((count + 1) * (1 - alpha) - 1e-9)
        if rank > count:
            return torch.ones_like(probs, dtype=torch.bool)  # too few examples to leave anything out
        kept = (conformity(probs, self.penalty) <= self.scores[rank - 1].cpu() + _ROUNDING).to(probs.device)
        return kept.scatter(-1, probs.argmax(-1, keepdim=True), True)


def conformity(probs: Tensor, penalty: float) -> Tensor:
    """[B, C] probability of a class and of all more probable ones, + penalty · (its rank − 5)₊; float64, on the CPU."""
    ordered, classes = probs.cpu().double().sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(1, probs.shape[-1] + 1)
    sums = ordered.cumsum(-1)
    scores = sums / sums[..., -1:] + penalty * (ranks - FREE_RANKS).clamp_min(0)
    return torch.empty_like(scores).scatter_(-1, classes, scores)


def fit_sets(
    bnn: BayesianModel, loader: Iterable[Any], *, penalty: float = 0.01, samples: int | None = None, seed: int = 0
) -> Conformal:
    """Keep the scores of a calibration set; see `BayesianModel.fit_sets`."""
    check_number("penalty", penalty, "finite and not negative", lambda v: 0.0 <= v < math.inf)
    predictive, labels = collect_labeled(bnn, loader, samples=samples, seed=seed, progress=False)
    if predictive.task != "classification" or labels.dim() != 1:
        raise ConfigError("sets of classes are for one class an example; tokens, pixels and several labels have more.")
    counts = labels != IGNORED
    scores = conformity(predictive.probs[counts], penalty).gather(-1, labels[counts, None].long()).squeeze(-1)
    bnn.conformal = Conformal(scores.sort().values, float(penalty), samples)
    return bnn.conformal
