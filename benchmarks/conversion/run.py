"""Seconds to convert a network, beside the seconds to build it, and the parameters that four members add.

python benchmarks/conversion/run.py
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from bayesify import bayesify

MODELS = ["resnet18", "resnet50", "convnext_tiny", "efficientnet_lite0", "vit_small_patch16_224", "mixer_b16_224"]


def timed(function: Callable[[], nn.Module]) -> tuple[float, nn.Module]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON goes.")] = Path(__file__).with_name("results.json"),
    repeats: int = 5,
    members: int = 4,
) -> None:
    table = Table(title=f"Conversion, {members} members, medians of {repeats} runs, torch {torch.__version__}")
    for column in ("model", "build s", "convert s", "ratio", "sites", "added"):
        table.add_column(column, justify="left" if column == "model" else "right")
    rows = []
    for name in MODELS:
        build, convert = [], []
        for _ in range(repeats):
            seconds, model = timed(lambda n=name: timm.create_model(n))
            build.append(seconds)
            seconds, bnn = timed(lambda m=model: bayesify(m, members=members))
            convert.append(seconds)
        row = {
            "model": name,
            "build_seconds": statistics.median(build),
            "convert_seconds": statistics.median(convert),
            "sites": len(bnn.report.converted),  # type: ignore[union-attr,arg-type]
            "parameter_overhead": bnn.report.parameter_overhead,  # type: ignore[union-attr]
        }
        rows.append(row)
        table.add_row(
            name,
            f"{row['build_seconds']:.2f}",
            f"{row['convert_seconds']:.2f}",
            f"{row['convert_seconds'] / row['build_seconds']:.2f}",
            str(row["sites"]),
            f"{100 * row['parameter_overhead']:.2f} %",
        )
    Console().print(table)
    output.write_text(json.dumps({"torch": torch.__version__, "members": members, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
