"""Factors: random vectors s and r with a variational posterior, one class a family.

Legend: K members, d the size of the vector, B examples. Every family gives its parameters, `loc` and `scale` after
constraints, `mean`, `noise` and `sample`, and what the KL needs: `entropy` and `second_moment`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify.added import Held
from bayesify.distributions.priors import SCALE_FLOOR, Prior, inverse_softplus

CLIP = 10.0
"""Draws are clipped to ±CLIP before use, as published (it exists for Cauchy tails); the KL is not clipped."""


class LeastSize:
    """The smallest |f| among the draws of many factors, found when it is first asked for.

    To ask a GPU is to wait for all that it has to do, which each layer in its turn should not.
    """

    def __init__(self, draws: Tensor) -> None:
        self._draws = draws.detach()
        self._found: float | None = None

    def __call__(self) -> float:
        if self._found is None:
            draws = self._draws
            self._found = float(draws.abs().min()) if draws.numel() else math.inf
        return self._found


class Factor(Held):
    """One random vector for each member: q(f) = mixture over k of q_k(f), f in R^d.

    Args:
        init: [K, d] float32 locations at the start.
        spread: scale of every element at the start.
        prior: prior of every element; KL is computed by `bayesify.distributions.kl`.

    During a forward pass of a `BayesianModel` the factor holds a draw of R rows, shape [R, d], where R is the number
    of members or of (member, example) rows. Outside of one it stands at the average of the members' means, so
    the bare network still works.
    """

    family: ClassVar[str]
    random: ClassVar[bool] = True
    loc: Tensor
    held: Tensor | None
    least: LeastSize | None = None
    """Of the draw in force and of others."""

    def __init__(self, init: Tensor, spread: float, prior: Prior, jitter: float = 0.0) -> None:
        super().__init__()
        self.prior = prior

    @property
    def members(self) -> int:
        return self.loc.shape[0]

    @property
    def size(self) -> int:
        return self.loc.shape[-1]

    @property
    def scale(self) -> Tensor:
        """[K, d] spread after constraints."""
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        """[K, d] posterior mean of the factor, float32; the median where there is no mean (Cauchy)."""
        return self.loc.float()

    @property
    def entropy(self) -> Tensor:
        """[K, d] differential entropy of each element, in nats."""
        raise NotImplementedError

    def second_moment(self, center: float | Tensor) -> Tensor:
        """[K, d] E (f − center)²."""
        raise NotImplementedError

    def noise(self, examples: int, generator: torch.Generator | None) -> Tensor:
        """[B, d] float32 noise for one member, from which `sample` makes draws."""
        return torch.randn(examples, self.size, generator=generator, device=self.loc.device)

    def sample(self, noise: Tensor, members: slice) -> Tensor:
        """Map noise [k, B, d] to draws [k, B, d] of the members in the slice, in float32, differentiably."""
        raise NotImplementedError

    def hold(self, value: Tensor | None, least: LeastSize | None = None) -> None:
        """Set the draw in force, [R, d]; `None` ends it."""
        super().hold(value)
        self.__dict__["least"] = least

    @property
    def at_mean(self) -> bool:
        """Whether the draw in force is not random, so that it comes again in the next call."""
        return self.held is not None and self.least is None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "least": None}

    def transform(self, noise: Tensor, members: slice) -> Tensor:
        """`sample`, clipped to ±CLIP: what a layer gets."""
        return self.sample(noise, members).clamp(-CLIP, CLIP)

    def value(self) -> Tensor:
        """[R, d] the draw in force, or [1, d] the average of the members' means outside of a forward pass."""
        return self.mean.mean(0, keepdim=True) if self.held is None else self.held

    def extra_repr(self) -> str:
        return f"members={self.members}, size={self.size}, posterior={self.family}"


class DeterministicFactor(Factor):
    """A point mass for each member: the mixture is BatchEnsemble, without a KL term."""

    family = "deterministic"
    random = False

    def __init__(self, init: Tensor, spread: float, prior: Prior, jitter: float = 0.0) -> None:
        super().__init__(init, spread, prior)
        self.loc = nn.Parameter(init)

    @property
    def scale(self) -> Tensor:
        return torch.zeros_like(self.loc)

    def sample(self, noise: Tensor, members: slice) -> Tensor:
        return self.mean[members, None].expand_as(noise)


class _LocationScale(Factor):
    """A location for each element and scale = softplus(rho) + 1e-7."""

    def __init__(self, init: Tensor, spread: float, prior: Prior, jitter: float = 0.0) -> None:
        super().__init__(init, spread, prior)
        self.loc = nn.Parameter(init)
        self.rho = nn.Parameter(self._start(init, spread, jitter))

    @staticmethod
    def _start(init: Tensor, spread: float, jitter: float) -> Tensor:
        """rho at the start; with jitter, drawn from a normal distribution cut at two standard deviations."""
        rho = torch.full(init.shape, inverse_softplus(spread))
        if jitter and init.device.type != "meta":
            rho += nn.init.trunc_normal_(torch.empty(init.shape), 0.0, jitter, -2 * jitter, 2 * jitter)
        return rho.to(init.device)

    @property
    def scale(self) -> Tensor:
        return F.softplus(self.rho.float()) + SCALE_FLOOR

    def sample(self, noise: Tensor, members: slice) -> Tensor:
        return torch.addcmul(self.loc.float()[members, None], self.scale[members, None], noise)


class NormalFactor(_LocationScale):
    """q_k(f) = N(loc_k, scale_k²)."""

    family = "normal"

    @property
    def entropy(self) -> Tensor:
        return self.scale.log() + 0.5 * math.log(2 * math.pi * math.e)

    def second_moment(self, center: float | Tensor) -> Tensor:
        return self.scale.square() + (self.loc.float() - center).square()


class SharedStdFactor(NormalFactor):
    """N(loc, scale²) with one learned scale for all members and elements."""

    family = "normal-shared-std"

    @staticmethod
    def _start(init: Tensor, spread: float, jitter: float) -> Tensor:
        return torch.tensor(inverse_softplus(spread), device=init.device)

    @property
    def scale(self) -> Tensor:
        return super().scale.expand(self.loc.shape)


class FixedStdFactor(NormalFactor):
    """N(loc, std²) with a fixed std, as Gaussian dropout has."""

    family = "normal-fixed-std"
    std: Tensor

    def __init__(self, init: Tensor, spread: float, prior: Prior, jitter: float = 0.0) -> None:
        Factor.__init__(self, init, spread, prior)
        self.loc = nn.Parameter(init)
        self.register_buffer("std", torch.tensor(max(spread, SCALE_FLOOR), device=init.device))

    @property
    def scale(self) -> Tensor:
        return self.std.float().expand(self.loc.shape)


class LogNormalFactor(_LocationScale):
    """log f ~ N(loc_k, scale_k²): positive, with loc and scale in log space; loc 0 changes nothing."""

    family = "log-normal"

    def __init__(self, init: Tensor, spread: float, prior: Prior, jitter: float = 0.0) -> None:
        super().__init__(init.log(), spread, prior, jitter)

    @property
    def mean(self) -> Tensor:
        return _exp(self.loc.float() + self.scale.square() / 2)

    @property
    def entropy(self) -> Tensor:
        return self.loc.float() + self.scale.log() + 0.5 * math.log(2 * math.pi * math.e)

    def second_moment(self, center: float | Tensor) -> Tensor:
        square = self.scale.square()
        variance = _exp(2 * self.loc.float() + 2 * square + torch.log(-torch.expm1(-square)))
        return variance + (self.mean - center).square()

    def sample(self, noise: Tensor, members: slice) -> Tensor:
        return _exp(super().sample(noise, members))


class CauchyFactor(_LocationScale):
    """q_k(f) = Cauchy(loc_k, scale_k). It has no mean; its median loc stands in."""

    family = "cauchy"

    @staticmethod
    def _start(init: Tensor, spread: float, jitter: float) -> Tensor:
        return _LocationScale._start(init, spread, 0.0)

    @property
    def entropy(self) -> Tensor:
        return (4 * math.pi * self.scale).log()

    def noise(self, examples: int, generator: torch.Generator | None) -> Tensor:
        uniform = torch.rand(examples, self.size, generator=generator, device=self.loc.device)
        return (math.pi * (uniform - 0.5)).tan()


class HalfCauchyFactor(CauchyFactor):
    """loc_k + scale_k |t| with t standard Cauchy, and loc = softplus(lower) + 1e-7: positive.

    It has no mean; its median loc + scale stands in.
    """

    family = "half-cauchy"

    def __init__(self, init: Tensor, spread: float, prior: Prior, jitter: float = 0.0) -> None:
        Factor.__init__(self, init, spread, prior)
        start = (init - spread).clamp_min(1e-3)  # so that the median is at init
        self.lower = nn.Parameter(start + torch.log(-torch.expm1(-start)))
        self.rho = nn.Parameter(self._start(init, spread, 0.0))

    @property
    def loc(self) -> Tensor:  # type: ignore[override]
        return F.softplus(self.lower.float()) + SCALE_FLOOR

    @property
    def mean(self) -> Tensor:
        return self.loc + self.scale

    @property
    def entropy(self) -> Tensor:
        return (2 * math.pi * self.scale).log()

    def noise(self, examples: int, generator: torch.Generator | None) -> Tensor:
        return super().noise(examples, generator).abs()


class MixtureOfDeltasFactor(Factor):
    """POINTS equally likely values for each element, learned; a draw picks one. Like a point mass, it carries no KL.

    The gradient reaches the values picked, not the choice.
    """

    family = "mixture-of-deltas"
    POINTS = 5

    def __init__(self, init: Tensor, spread: float, prior: Prior, jitter: float = 0.0) -> None:
        super().__init__(init, spread, prior)
        points = init.expand(self.POINTS, *init.shape).clone()
        if init.device.type != "meta":
            noise = torch.randn(points.shape)
            noise = (noise - noise.mean(0)) * math.sqrt(self.POINTS / (self.POINTS - 1))
            points += spread * noise.to(init.device)
        self.points = nn.Parameter(points)

    @property
    def loc(self) -> Tensor:  # type: ignore[override]
        return self.points.float().mean(0)

    @property
    def scale(self) -> Tensor:
        return self.points.float().std(0, unbiased=False)

    def noise(self, examples: int, generator: torch.Generator | None) -> Tensor:
        return torch.rand(examples, self.size, generator=generator, device=self.points.device)

    def sample(self, noise: Tensor, members: slice) -> Tensor:
        pick = (noise * self.POINTS).long().clamp_max(self.POINTS - 1)
        points = self.points.float()[:, members, None].expand(-1, -1, noise.shape[1], -1)
        return points.gather(0, pick[None])[0]


def _exp(x: Tensor) -> Tensor:
    """exp(x), continued linearly above 20, so that values and gradients stay finite in float32."""
    return x.clamp_max(20.0).exp() * (1 + (x - 20.0).clamp_min(0.0))


POSTERIORS: dict[str, type[Factor]] = {
    cls.family: cls
    for cls in (
        DeterministicFactor,
        NormalFactor,
        SharedStdFactor,
        FixedStdFactor,
        LogNormalFactor,
        CauchyFactor,
        HalfCauchyFactor,
        MixtureOfDeltasFactor,
    )
}
