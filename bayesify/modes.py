"""Evaluation mode for a while, training mode without that of batch norms, and one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Lock:
    """Held by one thread at a time, as often as it likes. A copy is a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()


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
