"""Evaluation mode for a while, training mode without that of batch norms, full precision, and one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
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
    training = [module for module in model.modules() if module.training] if isinstance(model, nn.Module) else []
    try:
        if training:  # to set the mode of each module takes as long as a small layer
            model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def full_float32() -> Iterator[None]:
    """Products in all digits of float32 inside: for comparing two ways to compute the same.

    GPUs, and CPUs if asked to, may round what they multiply to fewer digits; cuDNN's convolutions do by default.
    """
    changes = _settings_that_round()
    try:
        for put, full, _ in changes:
            put(full)
        yield
    finally:
        for put, _, before in changes:
            put(before)


def _settings_that_round() -> list[tuple[Callable[[Any], None], Any, Any]]:
    """(what sets it, its value for all digits, its value now) of torch's settings."""
    backends: Any = torch.backends
    try:
        matmul, rounds = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    except RuntimeError:  # they were made in torch's newer way, which is not to be mixed with the older
        holders = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        holders += [backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]
        return [(partial(setattr, holder, "fp32_precision"), "ieee", holder.fp32_precision) for holder in holders]
    changes: list[tuple[Callable[[Any], None], Any, Any]] = []
    if matmul != "highest":
        changes.append((torch.set_float32_matmul_precision, "highest", matmul))
    if rounds:
        changes.append((partial(setattr, backends.cudnn, "allow_tf32"), False, True))
    return changes


@contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Recurrent layers in evaluation mode have gradients inside: cuDNN's have none, torch's own have."""
    enabled = torch.backends.cudnn.enabled
    try:
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            torch.backends.cudnn.enabled = False
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def start_training(model: nn.Module, *, freeze_batch_norm: bool = False) -> None:
    """Training mode; frozen batch norms stay in evaluation mode, if they have running statistics."""
    model.train()
    if freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.track_running_stats:
                module.eval()
