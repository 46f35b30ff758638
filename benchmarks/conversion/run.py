"""Seconds to convert a network, beside the seconds to build it, and what four members add to it.

    python benchmarks/conversion/run.py

Each network is built and converted in a process of its own, several times; a row that was measured before is kept.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import timm
import torch
import typer
from rich.console import Console
from torch import nn

from bayesify import bayesify
from benchmarks.rows import Row, in_fresh_process, measured, show

TIMM = ["resnet18", "resnet50", "convnext_tiny", "efficientnet_lite0", "vit_small_patch16_224", "mixer_b16_224"]
LLAMA = "llama, 7 B parameters"
"""On the meta device, which has shapes and no memory."""


def main(
    output: Annotated[Path, typer.Option(help="Where rows and tables go.")] = Path("runs/conversion"),
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    members: Annotated[int, typer.Option(min=1)] = 4,
    redo: Annotated[bool, typer.Option("--redo", help="Measure again what was measured before.")] = False,
) -> None:
    console = Console()
    jobs = [(name,) for name in (*TIMM, LLAMA)]
    measure = partial(in_fresh_process, _measured, repeats, members)
    rows = measured(output / "conversion.json", jobs, measure, redo, console)
    head = ["network", "parameters", "build s", "convert s", "first look s", "sites", "added", "copied"]
    body = [
        [
            row["network"],
            f"{row['parameters'] / 1e6:,.0f} M",
            *(f"{row[key]:.2f}" for key in ("build_seconds", "convert_seconds", "look_seconds")),
            str(row["sites"]),
            f"{100 * row['parameter_overhead']:.2f} %",
            str(row["copied"]),
        ]
        for row in rows
    ]
    title = f"Conversion, {members} members, medians of {repeats} runs"
    show(output / "conversion.md", title, head, body, console)


def _measured(repeats: int, members: int, name: str) -> Row:
    build: Callable[[], nn.Module] = _llama if name == LLAMA else partial(timm.create_model, name)
    seconds: dict[str, list[float]] = {"build": [], "convert": [], "look": []}
    row: Row = {}
    for _ in range(repeats):
        model = _timed(seconds["build"], build)
        before = _places(model)
        bnn = _timed(seconds["convert"], partial(bayesify, model, members=members))
        after = {id(parameter): parameter.data_ptr() for _, parameter in bnn.slow_parameters()}
        _timed(seconds["look"], partial(bnn.passes.strategies.of, *_inputs(model)))
        row = {
            "network": name,
            "parameters": sum(parameter.numel() for _, parameter in bnn.slow_parameters()),
            "sites": len(bnn.report.converted),
            "parameter_overhead": bnn.report.parameter_overhead,
            "copied": len(before.items() - after.items()),
        }
    medians = {f"{key}_seconds": statistics.median(values) for key, values in seconds.items()}
    return {**row, **medians, "repeats": repeats, "members": members, "torch": torch.__version__}


def _timed(seconds: list[float], function: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = function()
    seconds.append(time.perf_counter() - start)
    return result


def _places(model: nn.Module) -> dict[int, int]:
    """{parameter: where its values are}, by which a copy is known."""
    return {id(parameter): parameter.data_ptr() for parameter in model.parameters()}


def _inputs(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(getattr(model, "main_input_name", None), str):
        return (), {"input_ids": torch.zeros(1, 16, dtype=torch.long, device="meta")}
    return (torch.randn(2, 3, 224, 224),), {}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(use_cache=False))


if __name__ == "__main__":
    typer.run(main)
