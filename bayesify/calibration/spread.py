"""The spread of the factors from data, without training: by the curvature of the likelihood, or by search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from bayesify.batch import split_batch
from bayesify.calibration.fisher import fisher, low_rank_fisher
from bayesify.config import check_number
from bayesify.distributions import NormalFactor
from bayesify.distributions.priors import SCALE_FLOOR
from bayesify.errors import ConfigError, DataError
from bayesify.evaluation.collect import collect_labeled

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

Method = Literal["fisher", "low-rank", "search"]

SPREADS = tuple(0.01 * 2 ** (i / 2) for i in range(11))
"""What the search tries, from 0.01 to 0.32, until NLL rises."""
SAMPLES = 8
"""Draws a member with which spreads are compared."""
PRIOR_SCALE = 0.3
PRIOR_SCALES = (0.03, 0.1, 0.2, 0.3, 0.5)
"""What validation chooses from, until NLL rises."""
RANK = 20
"""Directions of the low-rank part."""


@dataclass(frozen=True)
class SpreadFit:
    """What was set.

    Attributes:
        spread: mean standard deviation over all elements; of the members' means around 1 for "low-rank".
        examples: how many it was fitted on.
        prior_scale: the one given or chosen; None for "search".
    """

    spread: float
    examples: int
    prior_scale: float | None = None


def fit_spread(
    bnn: BayesianModel,
    loader: Iterable[Any],
    *,
    method: Method,
    prior_scale: float | None = None,
    validation: Iterable[Any] | None = None,
    seed: int = 0,
) -> SpreadFit:
    """Set the spread of every factor; see `BayesianModel.fit_spread`."""
    if method not in ("fisher", "low-rank", "search"):
        raise ConfigError(f"method={method!r} is unknown; expected 'fisher', 'low-rank' or 'search'.")
    if prior_scale is not None:
        check_number("prior_scale", prior_scale, "positive", lambda v: 0.0 < v < math.inf)
    if method == "search" and prior_scale is not None:
        raise ConfigError("method='search' compares spreads, and has no prior; leave prior_scale out.")
    if validation is not None and (prior_scale is not None or method == "search"):
        raise ConfigError("validation chooses the prior_scale of 'fisher' and 'low-rank'; leave prior_scale out.")
    if bnn.config.posterior != "normal":
        raise ConfigError(
            f"fit_spread needs a spread for every element, as posterior='normal' has; found {bnn.config.posterior!r}."
        )
    loader = _settled(bnn, loader)
    factors: list[NormalFactor] = [f for _, _, f in bnn.factors()]  # type: ignore[misc]
    with _kept(factors):
        if method == "search":
            fit = _search(bnn, factors, list(loader), seed)
        else:
            place, count = (_diagonal if method == "fisher" else _low_rank)(bnn, factors, loader, seed)
            if validation is None:
                chosen = PRIOR_SCALE if prior_scale is None else float(prior_scale)
            else:
                samples = SAMPLES if method == "fisher" else None
                chosen = _lowest_nll(bnn, PRIOR_SCALES, place, list(validation), samples, seed)[0]
            fit = SpreadFit(place(chosen), count, chosen)
    bnn.temperature, bnn.conformal = 1.0, None  # they were those of another predictive
    return fit


def _settled(bnn: BayesianModel, loader: Iterable[Any]) -> Iterable[Any]:
    """The same batches, after the model has seen the first if it has seen none: it may lose sites by it."""
    if not bnn.report.unsettled:
        return loader
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        return ()
    args, kwargs, _ = split_batch(send_to_device(first, next(bnn.parameters()).device))
    bnn.settled(lambda: None, args, kwargs)
    return itertools.chain([first], batches) if batches is loader else loader


def _diagonal(
    bnn: BayesianModel, factors: list[NormalFactor], loader: Iterable[Any], seed: int
) -> tuple[Callable[[float], float], int]:
    """A function of prior_scale that sets variance = 1 / (N · Fisher + 1 / prior_scale²), and N."""
    curvature, count = fisher(bnn, loader, seed)

    def place(prior_scale: float) -> float:
        for factor, own in zip(factors, curvature, strict=True):
            _set_scale(factor, (count * own + prior_scale**-2).rsqrt())
        return float(torch.cat([factor.scale.detach().flatten() for factor in factors]).mean())

    return place, count


def _low_rank(
    bnn: BayesianModel, factors: list[NormalFactor], loader: Iterable[Any], seed: int
) -> tuple[Callable[[float], float], int]:
    """A function of prior_scale that moves the members' means to draws, and N.

    The precision is N · (Uᵀ U + diag(v)) + 1 / prior_scale² = D½ (1 + Aᵀ A) D½ with A = √N U D^-½; so a draw is
    D^-½ (1 + Aᵀ A)^-½ z, for which the singular vectors of A are enough. Every other draw is the opposite of the one
    before, so that the mean over an even number of members is the network itself, to first order.
    """
    if any(not torch.equal(factor.mean, factor.mean[:1].expand_as(factor.mean)) for factor in factors):
        raise ConfigError(
            "method='low-rank' makes the members draws around one network, but they differ already; convert with "
            "init='ones', or use method='fisher', which keeps their means."
        )
    if bnn.members < 2:
        raise ConfigError(
            "method='low-rank' makes the members draws around the network; convert with members=2 or more."
        )
    directions, rest, count = low_rank_fisher(bnn, loader, RANK, seed)
    start = torch.cat([factor.mean[0].detach() for factor in factors])
    generator = torch.Generator(start.device).manual_seed(seed)
    shape = ((bnn.members + 1) // 2, len(start))
    z = torch.randn(shape, generator=generator, device=start.device)
    z = torch.stack([z, -z], 1).flatten(0, 1)[: bnn.members]

    def place(prior_scale: float) -> float:
        diagonal = count * rest + prior_scale**-2
        _, s, v = torch.linalg.svd(count**0.5 * directions / diagonal.sqrt(), full_matrices=False)
        draws = (z + (z @ v.T * ((1 + s.square()).rsqrt() - 1)) @ v) / diagonal.sqrt()
        for factor, own in zip(factors, (start + draws).split([f.mean.shape[1] for f in factors], 1), strict=True):
            with torch.no_grad():
                factor.loc.copy_(own)
            _set_scale(factor, torch.full_like(factor.rho, SCALE_FLOOR))
        return float(draws.square().mean().sqrt())

    return place, count


def _search(bnn: BayesianModel, factors: list[NormalFactor], batches: list[Any], seed: int) -> SpreadFit:
    def place(spread: float) -> float:
        for factor in factors:
            _set_scale(factor, torch.full_like(factor.rho, spread))
        return spread

    chosen, examples = _lowest_nll(bnn, SPREADS, place, batches, SAMPLES, seed)
    return SpreadFit(place(chosen), examples)


def _lowest_nll(
    bnn: BayesianModel,
    values: tuple[float, ...],
    place: Callable[[float], float],
    batches: list[Any],
    samples: int | None,
    seed: int,
) -> tuple[float, int]:
    """The value with the lowest NLL of the labels, tried in order until it rises, and the number of examples."""
    best, examples, nll = (math.inf, values[0]), 0, math.nan
    for value in values:
        place(value)
        predictive, labels = collect_labeled(bnn, batches, samples=samples, seed=seed, progress=False)
        examples, nll = len(predictive), float(predictive.nll(labels))
        if not nll < best[0]:
            break
        best = (nll, value)
    if best[0] == math.inf:
        raise DataError(f"the NLL of the labels is {nll}: outputs or inputs are not finite.")
    return best[1], examples


@contextmanager
def _kept(factors: list[NormalFactor]) -> Iterator[None]:
    """Put means and spreads back if it fails."""
    before = [(p, p.detach().clone()) for factor in factors for p in (factor.loc, factor.rho)]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)
        raise


@torch.no_grad()
def _set_scale(factor: NormalFactor, scale: Tensor) -> None:
    softplus = (scale.float() - SCALE_FLOOR).clamp_min(1e-12)
    factor.rho.copy_(softplus + torch.log(-torch.expm1(-softplus)))
