"""Which parameters train, and in which optimizer group."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from bayesify.distributions import Factor, Prior
from bayesify.errors import ConfigError
from bayesify.finetune.config import FineTuneConfig
from bayesify.graph.sites import matches
from bayesify.layers import MemberNorm, MemberVector, Site
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
    """Names of a classification head's parameters: timm's classifier, or what transformers put on its base model.

    Some transformers models have no base model under its usual name; what is no pretrained model in them is the head.
    """
    if callable(getattr(model, "get_classifier", None)):
        heads: Any = model.get_classifier()  # type: ignore[operator]
        wanted = {id(p) for h in (heads if isinstance(heads, (tuple, list)) else [heads]) if isinstance(h, nn.Module)
                  for p in h.parameters()}  # fmt: skip
        return {name for name, p in model.named_parameters() if id(p) in wanted}
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str):
        return set()
    base: Any = getattr(model, prefix, None) if prefix else None
    if callable(getattr(base, "get_classifier", None)):  # a network of timm in one of transformers
        return {f"{prefix}.{name}" for name in head_parameters(base)}
    if base is not None:
        bases = {prefix}
    else:
        bases = {name for name, child in model.named_children() if hasattr(child, "base_model_prefix")}
    return {name for name, _ in model.named_parameters() if bases and name.partition(".")[0] not in bases}


def parameter_groups(model: nn.Module, config: FineTuneConfig) -> list[dict[str, Any]]:
    """Factors, with their own learning rate and no decay, and all other weights by kind, which may decay."""
    kinds: dict[str, list[nn.Parameter]] = {"factors": [], "kernels": [], "biases": [], "norms": []}
    kind_of = _kinds(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            kinds[kind_of[id(parameter)]].append(parameter)
    rates = {"factors": config.learning_rate * config.factor_lr_multiplier}
    groups = [
        {
            "name": kind,
            "params": parameters,
            "lr": rates.get(kind, config.learning_rate),
            "weight_decay": config.weight_decay if kind in config.weight_decay_on else 0.0,
        }
        for kind, parameters in kinds.items()
        if parameters
    ]
    if not groups:
        raise ConfigError("no parameter of the model requires a gradient, so there is nothing to train.")
    return groups


def _kinds(model: nn.Module) -> dict[int, str]:
    """{id of a parameter: its kind}, by meaning.

    Kernels have two dimensions or more, biases are vectors of a module with a kernel, norms all other vectors. A
    member's own offset belongs to the kind of what it is added to.
    """
    kinds: dict[int, str] = {}
    for module in model.modules():
        weights = list(module.parameters(recurse=False))
        vector = "biases" if any(p.dim() > 1 for p in weights) else "norms"
        if isinstance(module, (Factor, Prior)):
            kinds |= {id(p): "factors" for p in weights}
        elif isinstance(module, (Site, MemberNorm)):
            offsets = "biases" if isinstance(module, Site) else "norms"
            for child in module.children():
                kinds |= {id(p): offsets for p in child.parameters() if isinstance(child, MemberVector)}
        elif not isinstance(module, MemberVector):
            for parameter in weights:
                kinds.setdefault(id(parameter), "kernels" if parameter.dim() > 1 else vector)
    return kinds


def make_optimizer(model: nn.Module, config: FineTuneConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups)


def make_schedule(optimizer: torch.optim.Optimizer, config: FineTuneConfig, total_steps: int) -> LRScheduler:
    """Linear warm-up, then the schedule of the config."""
    from transformers import get_scheduler

    warmup = round(config.warmup * total_steps)
    if config.schedule == "steps":
        milestones = [round(fraction * total_steps) for fraction in config.milestones]

        def factor(step: int) -> float:
            rising = min(1.0, step / warmup) if warmup else 1.0
            return rising * config.decay_factor ** sum(step >= milestone for milestone in milestones)

        return LambdaLR(optimizer, factor)
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
