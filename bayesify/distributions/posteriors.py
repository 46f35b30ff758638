"""Factors: random vectors s and r with a variational posterior, one file entry a family.

Legend: K members, d the size of the vector, B examples. Every family gives, in this order: parameters,
`loc` and `scale` after constraints, `mean`, `noise` and `transform`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify.distributions.priors import Prior

CLIP = 10.0
"""Draws are clipped to ±CLIP before use, as published (it exists for Cauchy tails); the KL is not clipped."""

SCALE_FLOOR = 1e-7
"""scale = softplus(rho) + SCALE_FLOOR."""


def inverse_softplus(scale: float) -> float:
    """rho with softplus(rho) + SCALE_FLOOR = scale; a scale at or below the floor maps to a tiny softplus."""
    softplus = max(scale - SCALE_FLOOR, 1e-12)
    return softplus + math.log(-math.expm1(-softplus))


class Factor(nn.Module):
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

    def __init__(self, init: Tensor, spread: float, prior: Prior) -> None:
        super().__init__()
        self.prior = prior
        self._draw: Tensor | None = None

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
        """[K, d] posterior mean of the factor, float32."""
        return self.loc.float()

    def noise(self, examples: int, generator: torch.Generator) -> Tensor:
        """[B, d] float32 standard noise for one member."""
        return torch.randn(examples, self.size, generator=generator, device=self.loc.device)

    def transform(self, noise: Tensor, members: slice) -> Tensor:
        """Map noise [k, B, d] to draws [k, B, d] of the members in the slice, in float32, differentiably."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """[R, d] the draw in force, or [1, d] the average of the members' means outside of a forward pass."""
        return self.mean.mean(0, keepdim=True) if self._draw is None else self._draw

    def hold(self, draw: Tensor | None) -> None:
        """Set the draw [R, d] that `value` returns; `None` removes it."""
        self._draw = draw

    def train(self, mode: bool = True) -> Factor:
        # A draw outlives a training forward, because gradient checkpointing runs layers again in backward.
        if not mode:
            self._draw = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_draw": None}

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of the original network has no factors: it loads, and the factors stay as they are.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"members={self.members}, size={self.size}, posterior={self.family}"


class DeterministicFactor(Factor):
    """A point mass for each member: the mixture is BatchEnsemble, without a KL term."""

    family = "deterministic"
    random = False

    def __init__(self, init: Tensor, spread: float, prior: Prior) -> None:
        super().__init__(init, spread, prior)
        self.loc = nn.Parameter(init)

    @property
    def scale(self) -> Tensor:
        return torch.zeros_like(self.loc)

    def transform(self, noise: Tensor, members: slice) -> Tensor:
        return self.mean[members, None].clamp(-CLIP, CLIP).expand_as(noise)


class NormalFactor(Factor):
    """q_k(f) = N(loc_k, scale_k²) with scale = softplus(rho) + 1e-7."""

    family = "normal"

    def __init__(self, init: Tensor, spread: float, prior: Prior) -> None:
        super().__init__(init, spread, prior)
        self.loc = nn.Parameter(init)
        self.rho = nn.Parameter(torch.full_like(init, inverse_softplus(spread)))

    @property
    def scale(self) -> Tensor:
        return F.softplus(self.rho.float()) + SCALE_FLOOR

    def transform(self, noise: Tensor, members: slice) -> Tensor:
        draw = torch.addcmul(self.loc.float()[members, None], self.scale[members, None], noise)
        return draw.clamp(-CLIP, CLIP)


POSTERIORS: dict[str, type[Factor]] = {cls.family: cls for cls in (DeterministicFactor, NormalFactor)}
