"""KL(q ‖ p) of a factor, in nats: one table of (posterior, prior).

Each formula returns [K]: the sum over the d elements of one member's KL. A member's KL is never averaged over
elements, and nothing here divides by the number of examples: `bayesify.objective` does, in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bayesify.distributions.posteriors import (
    POSTERIORS,
    CauchyFactor,
    DeterministicFactor,
    Factor,
    FixedStdFactor,
    HalfCauchyFactor,
    LogNormalFactor,
    MixtureOfDeltasFactor,
    NormalFactor,
    SharedStdFactor,
)
from bayesify.distributions.priors import (
    PRIORS,
    CauchyPrior,
    EmpiricalBayesPrior,
    HalfCauchyPrior,
    LogNormalPrior,
    LogUniformPrior,
    NormalPrior,
    Prior,
    TiedMeanPrior,
    TrainableStdPrior,
    UniformPrior,
)
from bayesify.distributions.special import mean_log_abs_normal
from bayesify.errors import ConfigError

Kind = Literal["zero", "closed form", "Monte Carlo", "refused"]
KL = Callable[[Factor, Prior], Tensor]

DRAWS = 8
"""Draws an element in a Monte Carlo estimate, made for it alone and not clipped. `kl_variance` states its variance."""


class Entry(NamedTuple):
    """One cell of the table: how the KL is had, the formula [K] if there is one, and why not if it is refused."""

    kind: Kind
    formula: KL | None = None
    reason: str = ""


_TABLE: dict[tuple[type[Factor], type[Prior]], Entry] = {}

_NORMALS = (NormalFactor, SharedStdFactor, FixedStdFactor)
_POINTS = (DeterministicFactor, MixtureOfDeltasFactor)
_NORMAL_PRIORS = (NormalPrior, TrainableStdPrior, TiedMeanPrior, EmpiricalBayesPrior)


def register_kl(posterior: type[Factor], prior: type[Prior], kind: Kind = "closed form") -> Callable[[KL], KL]:
    """Enter a formula in the table, for exactly this pair of types."""

    def enter(formula: KL) -> KL:
        _TABLE[posterior, prior] = Entry(kind, formula)
        return formula

    return enter


def kl_divergence(factor: Factor) -> Tensor:
    """[K] KL of each member of a factor to the factor's prior, in nats, float32.

    Against an improper prior (uniform, log-uniform) up to a constant; against an empirical-Bayes prior, with its
    hyperprior's share. A Monte Carlo estimate draws from torch's global generator.
    """
    entry = _TABLE.get((type(factor), type(factor.prior)))
    if entry is None or entry.formula is None:
        known = ", ".join(p.family for q, p in _TABLE if q is type(factor) and _TABLE[q, p].formula is not None)
        why = f" ({entry.reason.rstrip('.')})" if entry is not None else ""
        raise ConfigError(
            f"there is no KL of a {factor.family} posterior to a {factor.prior.family} prior{why}; "
            f"it has one to: {known or 'none'}. Enter one with register_kl."
        )
    return entry.formula(factor, factor.prior)


@torch.no_grad()
def kl_variance(factor: Factor, draws: int = 4096) -> Tensor:
    """[K] variance, in nats², of one Monte Carlo estimate of `kl_divergence`; 0 where the KL is exact."""
    entry = _TABLE.get((type(factor), type(factor.prior)))
    if entry is None or entry.kind != "Monte Carlo":
        return torch.zeros(factor.members, device=factor.loc.device)
    return factor.prior.log_prob(_draws(factor, draws)).var(1).sum(-1) / DRAWS


def check_pair(posterior: str, prior: str, prior_loc: float) -> None:
    """Raise `ConfigError` if this posterior and this prior do not go together."""
    entry = _TABLE[POSTERIORS[posterior], PRIORS[prior]]
    if entry.kind == "refused":
        usable = [name for name, other in PRIORS.items() if _TABLE[POSTERIORS[posterior], other].kind != "refused"]
        raise ConfigError(
            f"a {posterior} posterior and a {prior} prior do not go together: {entry.reason} "
            f"Priors for it: {', '.join(usable)}."
        )
    if prior == "half-cauchy" and prior_loc > 0 and entry.kind != "zero":
        raise ConfigError(
            f"a half-cauchy prior that starts at {prior_loc} leaves out posterior mass between 0 and there; "
            "give a prior_loc of 0 or less."
        )


def kl_table() -> str:
    """The table in Markdown: a row for each posterior, a column for each prior, and why pairs are refused."""
    lines = ["| posterior \\ prior | " + " | ".join(PRIORS) + " |", "|---" * (len(PRIORS) + 1) + "|"]
    reasons: dict[str, list[str]] = {}
    for name, posterior in POSTERIORS.items():
        cells = []
        for prior_name, prior in PRIORS.items():
            entry = _TABLE[posterior, prior]
            cells.append("–" if entry.kind == "refused" else "0" if entry.kind == "zero" else entry.kind)
            if entry.kind == "refused":
                reasons.setdefault(entry.reason, []).append(f"{name} ‖ {prior_name}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"* –: {', '.join(pairs)}: {reason}" for reason, pairs in reasons.items())]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ formulas


def _zero(q: Factor, p: Prior) -> Tensor:
    """A point mass carries no KL: −log p at the mass would be left of it, but for an infinite constant."""
    # Still a function of every parameter: data parallelism waits for the gradient of each, even an unused one.
    return 0.0 * q.loc.float().sum(-1) + 0.0 * sum(parameter.float().sum() for parameter in p.parameters())


def _to_normal(q: Factor, p: Prior) -> Tensor:
    """−H(q) + log(2πv)/2 + E(f − m)² / (2v); for a normal posterior log(p/s) + (s² + (μ−m)²)/(2p²) − 1/2."""
    scale = torch.as_tensor(p.scale, device=q.loc.device)
    center = q.mean if isinstance(p, TiedMeanPrior) else p.loc
    # The moment is divided by the scale first, which float32 needs at tiny scales.
    # A log-normal far down has a moment of 0, where the root has no gradient.
    distance = q.second_moment(center).clamp_min(torch.finfo(torch.float32).tiny).sqrt() / scale
    return (0.5 * distance.square() + scale.log() + 0.5 * math.log(2 * math.pi) - q.entropy).sum(-1)


def _to_empirical_bayes(q: Factor, p: Prior) -> Tensor:
    """KL to N(m, v*) − log InvGamma(v*), the hyperprior's share split evenly among the members."""
    assert isinstance(p, EmpiricalBayesPrior)
    moment = q.second_moment(p.loc)
    variance = p.variance(moment)
    kl = 0.5 * (moment / variance + (2 * math.pi * variance).log()) - q.entropy
    return kl.sum(-1) - p.log_hyperprior(variance) / q.members


def _log_normals(q: Factor, p: Prior) -> Tensor:
    """KL is invariant under exp: that of the underlying normals."""
    ratio, distance = q.scale / p.scale, (q.loc.float() - p.loc) / p.scale
    return (0.5 * (ratio.square() + distance.square() - 1.0) - ratio.log()).sum(-1)


def _cauchys(q: Factor, p: Prior) -> Tensor:
    """log( ((s + p)² + (μ − m)²) / (4 s p) )."""
    scale = q.scale + p.scale
    return (scale.square() + (q.loc.float() - p.loc).square()).log().sub((4 * q.scale * p.scale).log()).sum(-1)


def _to_uniform(q: Factor, p: Prior) -> Tensor:
    """−H(q)."""
    return -(q.entropy + 0.0 * q.loc.float()).sum(-1)  # of every parameter, as in `_zero`


def _normal_to_log_uniform(q: Factor, p: Prior) -> Tensor:
    """E log|f| − H(q) − log C = E log|z + ε| − E log|ε| with z = μ/s: exact, and never negative.

    The published approximation is −(k1 sigmoid(k2 + k3 log α) − log(1 + 1/α)/2 − k1) with α = s²/μ².
    """
    return (mean_log_abs_normal(q.loc.float() / q.scale) - mean_log_abs_normal(torch.zeros(()))).sum(-1)


def _log_normal_to_log_uniform(q: Factor, p: Prior) -> Tensor:
    """E log f = μ cancels that of the entropy."""
    return -(q.scale.log() + 0.5 * math.log(2 * math.pi * math.e) + LogUniformPrior.LOG_C + 0.0 * q.loc).sum(-1)


def _cauchy_to_log_uniform(q: Factor, p: Prior) -> Tensor:
    """E log|f| = log(μ² + s²) / 2."""
    return (torch.hypot(q.loc.float(), q.scale).log() - q.entropy - LogUniformPrior.LOG_C).sum(-1)


def _monte_carlo(q: Factor, p: Prior) -> Tensor:
    """−H(q) exactly, −E log p at DRAWS draws of its own."""
    return (-q.entropy - p.log_prob(_draws(q, DRAWS)).mean(1)).sum(-1)


def _draws(q: Factor, count: int) -> Tensor:
    """[K, count, d] reparameterized draws, not clipped."""
    noise = q.noise(q.members * count, None).unflatten(0, (q.members, count))
    return q.sample(noise, slice(None))


# ------------------------------------------------------------------------------------------------ the table


def _enter(
    posteriors: Iterable[type[Factor]], priors: Iterable[type[Prior]], kind: Kind, formula: KL | None, reason: str = ""
) -> None:
    for posterior in posteriors:
        for prior in priors:
            _TABLE[posterior, prior] = Entry(kind, formula, reason)


_enter(_POINTS, [p for p in PRIORS.values() if p is not TrainableStdPrior], "zero", _zero)
_enter(
    _POINTS, [TrainableStdPrior], "refused", None, "a point mass charges nothing from which a scale could be learned."
)
_enter((*_NORMALS, LogNormalFactor, CauchyFactor, HalfCauchyFactor), [UniformPrior], "closed form", _to_uniform)
_enter((*_NORMALS, LogNormalFactor), [NormalPrior, TrainableStdPrior, TiedMeanPrior], "closed form", _to_normal)
_enter((*_NORMALS, LogNormalFactor), [EmpiricalBayesPrior], "closed form", _to_empirical_bayes)
_enter([LogNormalFactor], [LogNormalPrior], "closed form", _log_normals)
_enter([CauchyFactor], [CauchyPrior], "closed form", _cauchys)
_enter(_NORMALS, [LogUniformPrior], "closed form", _normal_to_log_uniform)
_enter([LogNormalFactor], [LogUniformPrior], "closed form", _log_normal_to_log_uniform)
_enter([CauchyFactor], [LogUniformPrior], "closed form", _cauchy_to_log_uniform)
_enter((*_NORMALS, LogNormalFactor, HalfCauchyFactor), [CauchyPrior], "Monte Carlo", _monte_carlo)
_enter([LogNormalFactor, HalfCauchyFactor], [HalfCauchyPrior], "Monte Carlo", _monte_carlo)
_enter([HalfCauchyFactor], [LogNormalPrior, LogUniformPrior], "Monte Carlo", _monte_carlo)
_enter(
    [CauchyFactor, HalfCauchyFactor],
    _NORMAL_PRIORS,
    "refused",
    None,
    "the posterior's tails have no variance, and a normal prior charges for it.",
)
_enter(
    (*_NORMALS, CauchyFactor),
    [HalfCauchyPrior, LogNormalPrior],
    "refused",
    None,
    "the posterior has mass below zero, where the prior has none.",
)
