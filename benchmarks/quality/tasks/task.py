"""What a method is given: a pretrained network, data to train on, and data that it has and has not seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from bayesify import FineTuneConfig

DATA = Path(os.environ.get("BAYESIFY_DATA", "."))
CACHE = Path("runs/quality/cache")

Batches = list[Any]


@dataclass(frozen=True)
class Task:
    """What a method is given.

    Attributes:
        name: of the task, under which the fine-tuned plain networks are kept.
        network: seed to the pretrained network, whose new head, if it has one, that seed draws.
        train, validation: data sets.
        tests: {name: batches}; "clean" and what is shifted.
        outside: {name: batches} of data of no class that is known.
        tuning: what the fine-tunes of all methods share.
        dropout: modules whose inputs MC dropout drops; none for networks with dropout of their own.
        new_head: whether the head is to be learned.
        head: name of the last linear layer.
    """

    name: str
    network: Callable[[int], nn.Module]
    train: Dataset[Any]
    validation: Dataset[Any]
    tests: dict[str, Batches]
    outside: dict[str, Batches]
    tuning: FineTuneConfig
    head: str
    dropout: tuple[str, ...] = ()
    new_head: bool = True


def batches_of(data: Any, size: int = 100) -> Batches:
    """All of a data set in order."""
    collate = getattr(data, "collate_fn", None) or torch.utils.data.default_collate
    rows = [range(start, min(start + size, len(data))) for start in range(0, len(data), size)]
    if hasattr(data, "__getitems__"):
        return [collate(data.__getitems__(part)) for part in rows]
    return [collate([data[row] for row in part]) for part in rows]
