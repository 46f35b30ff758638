"""What is looked at before training begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bayesify.errors import ConfigError, DataError
from bayesify.finetune.batches import RankBatches
from bayesify.finetune.config import FineTuneConfig
from bayesify.model import BayesianModel


def check_map_style(data: Any) -> None:
    """Raise `DataError` for what is no data set with a length and an index."""
    lazy = isinstance(data, (DataLoader, IterableDataset))
    if lazy or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise DataError(
            f"expected a map-style data set, with len() and [index]; found {type(data).__name__}. Batches are "
            "made here: give the data set itself."
        )


def check_plain(model: nn.Module, config: FineTuneConfig) -> None:
    """A network without members has no use for these; what only scales the KL or the factors is let pass."""
    if isinstance(model, BayesianModel):
        return
    usual = FineTuneConfig()
    for name in ("train", "train_also", "norms_and_biases", "expand", "likelihood", "train_samples"):
        if getattr(config, name) != getattr(usual, name):
            raise ConfigError(f"{name}={getattr(config, name)!r} has no meaning for a network that is not Bayesian.")


def check_halves(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ConfigError(
                f"{name} is float16, in which squares of gradients vanish and steps are lost. Call model.float() "
                "first, and have precision='fp16' or 'bf16' for speed."
            )


def check_partition(model: nn.Module, config: FineTuneConfig, batches: RankBatches) -> None:
    if config.expand != "partition" or not isinstance(model, BayesianModel):
        return
    share = batches.batch_size // batches.world
    if share % model.members:
        raise DataError(
            f"expand='partition' needs a batch on each process that {model.members} members can share; found {share} "
            f"examples. Give a batch_size that is a multiple of {model.members * batches.world}."
        )
