"""Posteriors, priors and the KL table of the rank-1 factors."""

import torch

from bayesify.config import Rank1Config
from bayesify.distributions.kl import kl_divergence as kl_divergence
from bayesify.distributions.kl import register_kl as register_kl
from bayesify.distributions.posteriors import CLIP as CLIP
from bayesify.distributions.posteriors import POSTERIORS as POSTERIORS
from bayesify.distributions.posteriors import DeterministicFactor as DeterministicFactor
from bayesify.distributions.posteriors import Factor as Factor
from bayesify.distributions.posteriors import NormalFactor as NormalFactor
from bayesify.distributions.priors import PRIORS as PRIORS
from bayesify.distributions.priors import NormalPrior as NormalPrior
from bayesify.distributions.priors import Prior as Prior


def make_factor(config: Rank1Config, size: int, device: torch.device) -> Factor:
    """A new factor [K, size] in float32 on `device`, its locations drawn from the global CPU generator."""
    shape = (config.members, size)
    if config.init == "ones" or device.type == "meta":
        init = torch.ones(shape, device=device)
    else:
        init = torch.normal(1.0, config.init_scale, shape).to(device)
    prior = PRIORS[config.prior](config.prior_loc, config.prior_scale)
    return POSTERIORS[config.posterior](init, config.spread, prior)
