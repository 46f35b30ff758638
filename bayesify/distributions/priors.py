"""Priors of the factors, element by element: one class a family.

`loc` and `scale` are floats; a learned scale is a tensor [K, d]. `log_prob` gives the log-density in nats, without a
constant where the prior is improper.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify.added import Added

SCALE_FLOOR = 1e-7
"""scale = softplus(rho) + SCALE_FLOOR, for priors and posteriors."""


def inverse_softplus(scale: float) -> float:
    """rho with softplus(rho) + SCALE_FLOOR = scale; a scale at or below the floor maps to a tiny softplus."""
    softplus = max(scale - SCALE_FLOOR, 1e-12)
    return softplus + math.log(-math.expm1(-softplus))


class Prior(Added):
    """p(f) of every element of a factor."""

    family: ClassVar[str]
    of_each_element: ClassVar[bool] = True
    """Whether it is the same for every element, and knows none but it."""

    def __init__(self, loc: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.loc = loc
        self._scale = scale

    @classmethod
    def make(cls, loc: float, scale: float, init: Tensor) -> Prior:
        """A prior for a factor whose locations start at `init` [K, d]."""
        return cls(loc, scale)

    @property
    def scale(self) -> float | Tensor:
        return self._scale

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), element by element, in nats."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.family}, loc={self.loc}, scale={self._scale}"


class NormalPrior(Prior):
    """p(f) = N(loc, scale²)."""

    family = "normal"

    def log_prob(self, x: Tensor) -> Tensor:
        log_scale = self.scale.log() if isinstance(self.scale, Tensor) else math.log(self.scale)
        return -0.5 * ((x - self.loc) / self.scale).square() - log_scale - 0.5 * math.log(2 * math.pi)


class TrainableStdPrior(NormalPrior):
    """N(loc, scale²) with a learned scale for each element: softplus(rho) + 1e-7, rho [K, d]."""

    family = "trainable-std"
    of_each_element = False

    def __init__(self, loc: float, scale: float, shape: tuple[int, ...] = (1,)) -> None:
        super().__init__(loc, scale)
        self.rho = nn.Parameter(torch.full(shape, inverse_softplus(scale)))

    @classmethod
    def make(cls, loc: float, scale: float, init: Tensor) -> Prior:
        return cls(loc, scale, tuple(init.shape)).to(init.device)

    @property
    def scale(self) -> Tensor:
        return F.softplus(self.rho.float()) + SCALE_FLOOR


class TiedMeanPrior(Prior):
    """N(E[f], scale²): the prior's mean follows the posterior's, so that means are free."""

    family = "tied-mean"


class EmpiricalBayesPrior(Prior):
    """N(loc, v) with v ~ InvGamma(SHAPE, RATE), at the v that the posterior itself makes most probable.

    v* = (Σ E(f − loc)² + 2 RATE) / (n + 2 SHAPE + 2) over the n elements of the factor, members included.
    """

    family = "empirical-bayes"
    of_each_element = False
    SHAPE = 2.01
    RATE = 0.101

    def variance(self, second_moment: Tensor) -> Tensor:
        """v* from E(f − loc)² [K, d]."""
        return (second_moment.sum() + 2 * self.RATE) / (second_moment.numel() + 2 * self.SHAPE + 2)

    def log_hyperprior(self, variance: Tensor) -> Tensor:
        """log InvGamma(variance; SHAPE, RATE)."""
        constant = self.SHAPE * math.log(self.RATE) - math.lgamma(self.SHAPE)
        return constant - (self.SHAPE + 1) * variance.log() - self.RATE / variance


class CauchyPrior(Prior):
    """p(f) = 1 / (π scale (1 + ((f − loc) / scale)²)); horseshoe-like for the weights (paper, Fig. 1)."""

    family = "cauchy"

    def log_prob(self, x: Tensor) -> Tensor:
        return -((x - self.loc) / self.scale).square().log1p() - math.log(math.pi * self._scale)


class HalfCauchyPrior(CauchyPrior):
    """Twice the Cauchy density above loc, nothing below."""

    family = "half-cauchy"

    def log_prob(self, x: Tensor) -> Tensor:
        return math.log(2.0) + super().log_prob(x)


class LogNormalPrior(Prior):
    """log f ~ N(loc, scale²)."""

    family = "log-normal"

    def log_prob(self, x: Tensor) -> Tensor:
        log_x = x.clamp_min(torch.finfo(x.dtype).tiny).log()
        constant = math.log(self._scale) + 0.5 * math.log(2 * math.pi)
        return -0.5 * ((log_x - self.loc) / self._scale).square() - log_x - constant


class LogUniformPrior(Prior):
    """p(f) = C / |f|, improper; C makes the KL of a normal around zero vanish, as is usual (Molchanov et al. 2017)."""

    family = "log-uniform"
    LOG_C = -0.5 * (math.log(2.0) + 0.57721566490153286) - 0.5 * math.log(2 * math.pi * math.e)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.LOG_C - x.abs().clamp_min(torch.finfo(x.dtype).tiny).log()


class UniformPrior(Prior):
    """p(f) = 1, improper: only the posterior's entropy is left of the KL."""

    family = "uniform"

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


PRIORS: dict[str, type[Prior]] = {
    cls.family: cls
    for cls in (
        NormalPrior,
        CauchyPrior,
        HalfCauchyPrior,
        LogNormalPrior,
        LogUniformPrior,
        UniformPrior,
        EmpiricalBayesPrior,
        TiedMeanPrior,
        TrainableStdPrior,
    )
}
