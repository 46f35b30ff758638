"""All of timm: every name converted without weights; every kind of network of every family checked with random ones."""

from __future__ import annotations

import fnmatch
from typing import Any

import timm
import torch
from timm.models import _registry
from torch import nn
from torch.overrides import TorchFunctionMode

from benchmarks.coverage.checks import census, check, conversion
from benchmarks.coverage.jobs import Job, Row
from benchmarks.coverage.original import Inputs

FAST = ("resnet10t", "mobilenetv3_small_050", "test_mambaout", "pvt_v2_b0", "test_byobnet")
"""Small networks of different kinds, for a test of less than a minute; the model table of the tests has more."""

_SIZES = (64, 96, 126, 128, 160)
"""Image sizes to try before the network's own, 126 for patches of 14; below 64 whole stages shrink to one pixel, where
nothing depends on attention."""

_CHEAP = 30_000_000
"""Further variants of a family are checked up to this many parameters."""


def plan(rows: list[Row], only: str, fast: bool) -> list[Job]:
    """A census of all names, which decides the variants to check; then the conversion of every name."""
    chosen, jobs = chosen_after_census("timm", rows, only, fast, further=True)
    jobs += [Job("timm", "full", name, family(name)) for name in chosen]
    if chosen and not fast:
        jobs += [Job("timm", "meta", name, family(name)) for name in _names(only)]
    return jobs


def chosen_after_census(
    suite: str, rows: list[Row], only: str, fast: bool, further: bool
) -> tuple[list[str], list[Job]]:
    """The names to check, none before the census is done, and the jobs of the census."""
    if fast:
        return [name for name in FAST if fnmatch.fnmatch(name, only)], []
    names = _names(only)
    known = {row["name"]: row for row in rows if row["stage"] == "census"}
    chosen = variants([known[name] for name in names], further) if known.keys() >= set(names) else []
    return chosen, [Job(suite, "census", name, family(name)) for name in names]


def _names(only: str) -> list[str]:
    return [name for name in timm.list_models() if fnmatch.fnmatch(name, only)]


def family(name: str) -> str:
    """The file of timm that defines the model."""
    return _registry._model_to_module[name]


def variants(rows: list[Row], further: bool) -> list[str]:
    """For each family its smallest model, and, with `further`, every cheap one with modules that no smaller one has."""
    seen: dict[str, set[str]] = {}
    chosen = []
    for row in sorted(rows, key=lambda row: (row.get("parameters", 0), row["name"])):
        classes = set(row.get("classes", []))
        new = further and row.get("parameters", 0) <= _CHEAP and classes - seen.get(row["family"], set())
        if row["family"] not in seen or new:
            chosen.append(row["name"])
            seen[row["family"]] = seen.get(row["family"], set()) | classes
    return chosen


def measure(job: Job) -> Row:
    if job.stage == "census":
        return census(lambda: _without_weights(job.name))
    if job.stage == "meta":
        return conversion(lambda: _without_weights(job.name))
    return check(lambda: build(job.name))


def build(name: str) -> tuple[nn.Module, Inputs]:
    """The network with random weights and two images of the smallest size that it accepts."""
    options, shape = smallest_input(name)
    torch.manual_seed(0)
    return timm.create_model(name, **options), ((torch.randn(2, *shape),), {})


def smallest_input(name: str) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Options of the model and the shape of an image, tried without weights."""
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own = tuple(cfg.input_size) if cfg is not None else (3, 224, 224)
    for size in _SIZES:
        if size >= own[-1]:
            break
        shape = (own[0], size, size)
        for options in ({"img_size": size}, {}):
            try:
                model = _without_weights(name, **options).eval()
                with torch.no_grad(), torch.device("meta"):
                    model(torch.empty(2, *shape))
                return options, shape
            except Exception:
                # Every network refuses what it cannot take in its own way.
                continue
    return {}, own


def _without_weights(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"), _Unfilled():
        return timm.create_model(name, **options)


class _Unfilled(TorchFunctionMode):
    """Leaves out what would fill weights: there are none, and pretending takes most of the time to build a network."""

    FILLS = ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "div_", "clamp_", "copy_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
