"""Which parameters train, and in which optimizer group."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn

from bayesify.errors import ConfigError
from bayesify.finetune.config import FineTuneConfig
from bayesify.graph.sites import matches
from bayesify.model import BayesianModel


def select_trained(model: nn.Module, config: FineTuneConfig) -> None:
    """Set `requires_grad` of every slow weight as the config says. Frozen slow weights never get a gradient.

    Raises:
        ConfigError: a pattern of `train_also` matches nothing. Nothing is changed then.
    """
    if not isinstance(model, BayesianModel):
        return
    slow = dict(model.slow_parameters())
    for pattern in config.train_also:
        if not any(matches(name, pattern) for name in slow):
            near = difflib.get_close_matches(pattern, slow, n=3, cutoff=0.0)
            raise ConfigError(f"train_also={pattern!r} matches no weight. Nearest names: {', '.join(near)}.")
    if config.train == "all":
        return
    head = head_parameters(model.model)
    for name, parameter in slow.items():
        wanted = name in head or any(matches(name, pattern) for pattern in config.train_also)
        wanted = wanted or (config.norms_and_biases and parameter.dim() <= 1)
        parameter.requires_grad_(wanted and parameter.is_floating_point())


def head_parameters(model: nn.Module) -> set[str]:
    """Names of a classification head's parameters: timm's classifier, or what transformers put on its base model."""
    if callable(getattr(model, "get_classifier", None)):
        heads: Any = model.get_classifier()  # type: ignore[operator]
        wanted = {id(p) for h in (heads if isinstance(heads, (tuple, list)) else [heads]) if isinstance(h, nn.Module)
                  for p in h.parameters()}  # fmt: skip
        return {name for name, p in model.named_parameters() if id(p) in wanted}
    prefix = getattr(model, "base_model_prefix", None)
    if isinstance(prefix, str) and prefix and hasattr(model, prefix):
        return {name for name, _ in model.named_parameters() if not name.startswith(f"{prefix}.")}
    return set()


def parameter_groups(model: nn.Module, config: FineTuneConfig) -> list[dict[str, Any]]:
    """Factors (own learning rate, no decay), slow matrices (decay), slow vectors (none)."""
    factors: list[nn.Parameter] = []
    if isinstance(model, BayesianModel):
        factors = [p for _, _, factor in model.factors() for p in factor.parameters() if p.requires_grad]
    fast = {id(p) for p in factors}
    slow = [p for p in model.parameters() if p.requires_grad and id(p) not in fast]
    groups = [
        {
            "name": "factors",
            "params": factors,
            "lr": config.learning_rate * config.factor_lr_multiplier,
            "weight_decay": 0.0,
        },
        {"name": "matrices", "params": [p for p in slow if p.dim() > 1], "weight_decay": config.weight_decay},
        {"name": "vectors", "params": [p for p in slow if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [{"lr": config.learning_rate, **group} for group in groups if group["params"]]
    if not groups:
        raise ConfigError("no parameter of the model requires a gradient, so there is nothing to train.")
    return groups


def make_optimizer(model: nn.Module, config: FineTuneConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups)
