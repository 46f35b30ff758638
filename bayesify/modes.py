"""Evaluation mode for a while, and training mode without that of batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode inside; afterwards each submodule has its own mode back, as some may be frozen in eval.

    Anything but a module passes through untouched.
    """
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        if modes:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def start_training(model: nn.Module, *, freeze_batch_norm: bool = False) -> None:
    """Training mode; frozen batch norms stay in evaluation mode, if they have running statistics."""
    model.train()
    if freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.eval()
