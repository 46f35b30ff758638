"""KL(q ‖ p) of a factor, in nats: one table of (posterior, prior).

Each entry returns [K]: the sum over the d elements of one member's KL. A member's KL is never averaged over
elements, and nothing here divides by the number of examples: `bayesify.objective` does, in one place.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bayesify.distributions.posteriors import DeterministicFactor, Factor, NormalFactor
from bayesify.distributions.priors import NormalPrior, Prior
from bayesify.errors import ConfigError

KL = Callable[[Factor, Prior], Tensor]

_TABLE: dict[tuple[type[Factor], type[Prior]], KL] = {}


def register_kl(posterior: type[Factor], prior: type[Prior]) -> Callable[[KL], KL]:
    """Enter a formula in the table, for exactly this pair of types."""

    def enter(formula: KL) -> KL:
        _TABLE[posterior, prior] = formula
        return formula

    return enter


def kl_divergence(factor: Factor) -> Tensor:
    """[K] KL of each member of a factor to the factor's prior, in nats, float32."""
    formula = _TABLE.get((type(factor), type(factor.prior)))
    if formula is None:
        pairs = ", ".join(f"{q.family}‖{p.family}" for q, p in _TABLE)
        raise ConfigError(
            f"there is no KL of a {factor.family} posterior to a {factor.prior.family} prior; known pairs: {pairs}."
        )
    return formula(factor, factor.prior)


@register_kl(DeterministicFactor, NormalPrior)
def _deterministic(q: Factor, p: Prior) -> Tensor:
    """A point mass carries no KL: the mixture is then an ensemble trained by maximum likelihood."""
    # Still a function of loc: data parallelism waits for a gradient of every parameter, even an unused one.
    return 0.0 * q.loc.float().sum(-1)


@register_kl(NormalFactor, NormalPrior)
def _normal_normal(q: Factor, p: Prior) -> Tensor:
    """KL(N(μ, σ²) ‖ N(m, τ²)) = log(τ/σ) + (σ² + (μ − m)²) / (2τ²) − 1/2."""
    mean, std = q.loc.float(), q.scale
    ratio = (std / p.scale).square()  # type: ignore[operator]
    distance = ((mean - p.loc) / p.scale).square()  # type: ignore[operator]
    return (0.5 * (ratio + distance - 1.0 - ratio.log())).sum(-1)
