"""Posteriors, priors and the KL table of the rank-1 factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesify.distributions.joint import alike as alike
from bayesify.distributions.joint import hold_parts as hold_parts
from bayesify.distributions.joint import side_by_side as side_by_side
from bayesify.distributions.kl import check_pair as check_pair
from bayesify.distributions.kl import kl_divergence as kl_divergence
from bayesify.distributions.kl import kl_table as kl_table
from bayesify.distributions.kl import kl_variance as kl_variance
from bayesify.distributions.kl import register_kl as register_kl
from bayesify.distributions.posteriors import CLIP as CLIP
from bayesify.distributions.posteriors import POSTERIORS as POSTERIORS
from bayesify.distributions.posteriors import DeterministicFactor as DeterministicFactor
from bayesify.distributions.posteriors import Factor as Factor
from bayesify.distributions.posteriors import NormalFactor as NormalFactor
from bayesify.distributions.priors import PRIORS as PRIORS
from bayesify.distributions.priors import NormalPrior as NormalPrior
from bayesify.distributions.priors import Prior as Prior

if TYPE_CHECKING:
    from bayesify.config import Rank1Config


def make_factor(config: Rank1Config, size: int, device: torch.device, signs: bool = False) -> Factor:
    """A new factor [K, size] in float32 on `device`, drawn from the global CPU generator where its start is random.

    With `signs` it starts with random ones, if it has signs: see `Rank1Config.new_layers`.
    """
    init = _start(config, (config.members, size), device)
    if signs and config.signed_start and device.type != "meta":
        init *= _signs((config.members, size), 0.5).to(device)
    prior = PRIORS[config.prior].make(config.prior_location, config.prior_scale, init)
    return POSTERIORS[config.posterior](init, config.spread, prior, config.spread_jitter)


def _start(config: Rank1Config, shape: tuple[int, int], device: torch.device) -> Tensor:
    """[K, d] where each element starts: its location, on the scale of the draws also for positive families."""
    from bayesify.config import POSITIVE

    if config.init == "ones" or device.type == "meta":
        return torch.full(shape, config.neutral, device=device)
    if config.init == "random-sign":
        return _signs(shape, config.sign_probability).to(device)
    if config.posterior in POSITIVE:
        return torch.normal(0.0, config.start_scale(), shape).exp().to(device)
    return torch.normal(config.neutral, config.start_scale(), shape).to(device)


def _signs(shape: tuple[int, int], probability: float) -> Tensor:
    """+1 with that probability, and −1 otherwise."""
    return torch.bernoulli(torch.full(shape, probability)).mul(2).sub(1)
