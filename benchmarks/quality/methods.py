"""Ours, and the plain fine-tune: a task and a seed to outputs [K, S, N, C] of any set, all by the same loop."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tasks import Batches, Task, batches_of
from tasks.task import CACHE
from torch import Tensor, nn
from torch.utils.data import Dataset

from bayesify import BayesianModel, FineTuner, bayesify
from bayesify.evaluation import collect

Predict = Callable[[Batches], Tensor]
"""Batches to outputs [K, S, N, C]."""
MEMBERS = 4
DRAWS = 8
"""Of MC dropout, SWAG, Laplace and mean-field VI: twice the cost of four members."""


def outputs_of(model: Any, batches: Batches, samples: int | None = None) -> Tensor:
    return collect(model, batches, samples=samples, progress=False, labeled=False)[0].outputs


def tuned(task: Task, seed: int, model: nn.Module, **options: Any) -> nn.Module:
    """The model, fine-tuned as the task says, at the state with the best validation NLL."""
    config = replace(task.tuning, seed=seed, **options)
    FineTuner(model, task.train, task.validation, config, progress=False).fit()
    return model


def plain(task: Task, seed: int, **options: Any) -> nn.Module:
    """The fine-tuned network without anything else; kept on disk, as several methods start from it."""
    from safetensors.torch import load_file, save_file

    network = task.network(seed)
    path = CACHE / "plain" / f"{task.name}-{key_of(options)}-seed{seed}.safetensors"
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.eval()
    tuned(task, seed, network, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return network


def key_of(options: dict[str, Any]) -> str:
    """A short name of options for files."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8] if options else "default"


def deterministic(task: Task, seed: int, tuning: dict[str, Any] | None = None) -> Predict:
    model = plain(task, seed, **(tuning or {}))
    return lambda batches: outputs_of(model, batches)


def untouched(task: Task, seed: int) -> Predict:
    model = task.network(seed)
    return lambda batches: outputs_of(model, batches)


def rank1(
    task: Task, seed: int, tuning: dict[str, Any] | None = None, samples: int | None = None, **options: Any
) -> Predict:
    """Ours; without options, as shipped. A new head is named, as the command line does."""
    network = task.network(seed)
    torch.manual_seed(seed)
    options = {"members": MEMBERS, "new_layers": (task.head,) if task.new_head else (), **options}
    model = bayesify(network, **options)
    tuned(task, seed, model, **(tuning or {}))
    return lambda batches: outputs_of(model, batches, samples)


def evaluation_of(data: Dataset[Any]) -> Dataset[Any]:
    """A training set without augmentation."""
    data = copy.copy(data)
    if hasattr(data, "training"):
        data.training = False  # type: ignore[attr-defined]
    return data


def batch_ensemble(task: Task, seed: int) -> Predict:
    """Four members with factors that have no spread."""
    return rank1(task, seed, posterior="deterministic")


def spread(task: Task, seed: int, method: str = "fisher", validated: bool = False) -> Predict:
    """No training: eight draws around the pretrained network, their spread from the training data.

    With the labels of the validation set, if they are to choose the prior.
    """
    members = DRAWS if method == "low-rank" else 1
    model: BayesianModel = bayesify(task.network(seed), members=members, init="ones", noise="member")
    validation = batches_of(task.validation) if validated else None
    data = task.validation if method == "search" else evaluation_of(task.train)
    model.fit_spread(batches_of(data), method, validation=validation, seed=seed)  # type: ignore[arg-type]
    return lambda batches: outputs_of(model, batches, None if method == "low-rank" else DRAWS)
