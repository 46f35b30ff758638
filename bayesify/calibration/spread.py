"""The spread of the factors from data, without training: by the curvature of the likelihood, or by search.

Legend: K members, B examples of a batch, N of all, D elements of all factors of one member.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from bayesify.batch import Rows, split_batch
from bayesify.config import check_number
from bayesify.distributions import NormalFactor
from bayesify.distributions.priors import SCALE_FLOOR
from bayesify.errors import ConfigError, DataError
from bayesify.evaluation.collect import collect_labeled
from bayesify.modes import evaluating
from bayesify.tasks import resolve_task

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

Method = Literal["fisher", "search"]

SPREADS = tuple(0.01 * 2 ** (i / 2) for i in range(11))
"""What the search tries, from 0.01 to 0.32, until NLL rises."""
SAMPLES = 8
"""Draws a member with which the search compares spreads."""


@dataclass(frozen=True)
class SpreadFit:
    """What was set: the mean spread over all elements, and the number of examples it was fitted on."""

    spread: float
    examples: int


def fit_spread(
    bnn: BayesianModel, loader: Iterable[Any], *, method: Method, prior_scale: float = 0.3, seed: int = 0
) -> SpreadFit:
    """Set the spread of every factor; see `BayesianModel.fit_spread`."""
    if method not in ("fisher", "search"):
        raise ConfigError(f"method={method!r} is unknown; expected 'fisher' or 'search'.")
    check_number("prior_scale", prior_scale, "positive", lambda v: 0.0 < v < math.inf)
    if bnn.config.posterior != "normal":
        raise ConfigError(
            f"fit_spread needs a spread for every element, as posterior='normal' has; found {bnn.config.posterior!r}."
        )
    factors: list[NormalFactor] = [f for _, _, f in bnn.factors()]  # type: ignore[misc]
    if method == "search":
        return _search(bnn, factors, list(loader), seed)
    curvature, count = fisher(bnn, loader, seed)
    for factor, own in zip(factors, curvature, strict=True):
        _set(factor, (count * own + prior_scale**-2).rsqrt())
    bnn.temperature, bnn.conformal = 1.0, None  # they were those of another predictive
    return SpreadFit(_mean_spread(factors), count)


def fisher(bnn: BayesianModel, loader: Iterable[Any], seed: int = 0) -> tuple[list[Tensor], int]:
    """[K, d] mean over examples of the squared gradient of log p(y | x), for each factor at its mean, and N.

    y is drawn from the member's own prediction, which makes this the diagonal of the Fisher information, not of the
    empirical one. Labels in the data are not used. Every row has its own copy of the factors, so one backward pass
    gives the gradients of all examples.

    Raises:
        DataError: no examples, or outputs that are not classes.
    """
    factors = [f for _, _, f in bnn.factors()]
    sums = [torch.zeros_like(factor.mean, dtype=torch.float64) for factor in factors]
    device, count = factors[0].mean.device, 0
    generator = torch.Generator(device).manual_seed(seed)
    with evaluating(bnn), torch.enable_grad():
        for batch in loader:
            args, kwargs, _ = split_batch(_to(batch, device))
            bnn.settled(lambda: None, args, kwargs)
            examples = Rows(bnn.model).batch_size(args, kwargs)
            for member in range(bnn.members):
                gradients = _gradients(bnn, partial(bnn.model, *args, **kwargs), factors, member, examples, generator)
                for total, gradient in zip(sums, gradients, strict=True):
                    total[member] += gradient.double().square().sum(0)
            count += examples
    if not count:
        raise DataError("there is no example in the data: every batch is empty.")
    return [(total / count).float() for total in sums], count


def _gradients(
    bnn: BayesianModel, call: Callable[[], Any], factors: list[Any], member: int, examples: int, generator: Any
) -> list[Tensor]:
    """[B, d] for each factor: the gradient of each example's log-likelihood of a label drawn for it."""
    with bnn.passes.draws.drawn(slice(member, member + 1), examples, None):
        leaves = [factor.mean[member].detach().repeat(examples, 1).requires_grad_() for factor in factors]
        for factor, leaf in zip(factors, leaves, strict=True):
            factor.hold(leaf)
        logits = Rows(bnn.model).outputs(call())
        task = resolve_task(logits, bnn.task)
        if task != "classification":
            raise DataError(f"the Fisher information is computed for classes; these are outputs of a {task}.")
        log_probs = logits.float().log_softmax(-1).flatten(0, -2)
        labels = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
        return list(torch.autograd.grad(log_probs.gather(1, labels).sum(), leaves))


def _search(bnn: BayesianModel, factors: list[NormalFactor], batches: list[Any], seed: int) -> SpreadFit:
    before = [factor.rho.detach().clone() for factor in factors]
    best: tuple[float, float] | None = None
    examples = 0
    try:
        for spread in SPREADS:
            for factor in factors:
                _set(factor, torch.full_like(factor.rho, spread))
            predictive, labels = collect_labeled(bnn, batches, samples=SAMPLES, seed=seed, progress=False)
            examples, nll = len(predictive), float(predictive.nll(labels))
            if best is not None and not nll < best[0]:
                break
            best = (nll, spread)
    except BaseException:
        with torch.no_grad():
            for factor, rho in zip(factors, before, strict=True):
                factor.rho.copy_(rho)
        raise
    chosen = SPREADS[0] if best is None else best[1]
    for factor in factors:
        _set(factor, torch.full_like(factor.rho, chosen))
    bnn.temperature, bnn.conformal = 1.0, None
    return SpreadFit(chosen, examples)


@torch.no_grad()
def _set(factor: NormalFactor, scale: Tensor) -> None:
    softplus = (scale.float() - SCALE_FLOOR).clamp_min(1e-12)
    factor.rho.copy_(softplus + torch.log(-torch.expm1(-softplus)))


def _mean_spread(factors: list[NormalFactor]) -> float:
    return float(torch.cat([factor.scale.detach().flatten() for factor in factors]).mean())


def _to(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
