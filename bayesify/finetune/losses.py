"""What a batch is measured by: the likelihood of its labels, or the loss that a network computes itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bayesify.batch import Rows, is_target, loss_of, map_tensors
from bayesify.errors import DataError
from bayesify.objective import ELBOTerms, task_nll
from bayesify.tasks import TaskName


def for_own_loss(network: nn.Module, kwargs: dict[str, Any], labels: Tensor | None) -> dict[str, Any] | None:
    """The keyword inputs with which a network computes its loss itself; `None` where the loss is ours.

    Labels for each token are shifted and masked by a transformers model, so its loss is taken; and so it is for labels
    of other names or kinds (start_positions, the objects of images).
    """
    if labels is None:
        return kwargs if any(map(is_target, kwargs)) else None
    return {**kwargs, "labels": labels} if labels.dim() > 1 and kwargs and _takes_labels(network) else None


def _takes_labels(network: nn.Module) -> bool:
    parameters = inspect.signature(network.forward).parameters
    return "labels" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def own_loss(output: Any) -> Tensor:
    """The loss that a network computed from labels. Raises `DataError` if there is none."""
    loss = loss_of(output)
    if loss is None:
        raise DataError("the network got labels but gave no loss; expected an output with `loss`.")
    return loss


def nan_in(batch: Any) -> str | None:
    """Where there is NaN in a batch, in words."""
    found: list[str] = []

    def look(value: Any) -> Any:
        tensor = value.data if isinstance(value, PackedSequence) else value
        if tensor.is_floating_point() and tensor.isnan().any():
            found.append(f"holds NaN, in inputs or labels of shape {tuple(tensor.shape)}.")
        return value

    map_tensors(batch, look)
    return found[0] if found else None


def plain_nll(model: nn.Module, task: TaskName) -> Callable[..., ELBOTerms]:
    """The loss of a plain network, in the form the loop expects."""

    def objective(output: Any, targets: Tensor | None, step: int, values: float = 1.0) -> ELBOTerms:
        nll = own_loss(output) if targets is None else task_nll(Rows(model).outputs(output), targets, task)
        return ELBOTerms(nll, nll.detach(), torch.zeros(()), 0.0)

    return objective
