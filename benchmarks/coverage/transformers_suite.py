"""All of transformers: one tiny model with random weights for every model type."""

from __future__ import annotations

import fnmatch
import re

from torch import nn

from benchmarks.coverage.checks import check
from benchmarks.coverage.jobs import Job, Row
from benchmarks.coverage.original import Inputs
from benchmarks.coverage.transformers_models import build, head_of, names

FAST = ("gpt2", "llama", "t5", "vit")
"""A few of different kinds, for a test."""


def plan(rows: list[Row], only: str, fast: bool) -> list[Job]:
    chosen = FAST if fast else names()
    return [Job("transformers", "full", name, family(name)) for name in chosen if fnmatch.fnmatch(name, only)]


def family(name: str) -> str:
    """The kind of head, e.g. ForCausalLM."""
    match = re.search(r"For[A-Z]\w*$|[A-Z][a-z]+$", head_of(name))
    return match[0] if match else head_of(name)


def measure(job: Job) -> Row:
    return check(lambda: _build(job.name))


def _build(name: str) -> tuple[nn.Module, Inputs]:
    model, inputs = build(name)
    return model, ((), inputs)
