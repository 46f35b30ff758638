"""Which start, sites, noise and objective? Every variant of the conversion and the fine-tune, beside the plain one.

python benchmarks/quality/study.py flowers cells                       # all variants
python benchmarks/quality/study.py clinc-10 --only "plain; last stage"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from finetuned import Runs, tabulate
from rich.console import Console
from tasks import TASKS

STAGE = {"sites": "last-stage"}
NARROW = {**STAGE, "prior_scale": 0.1}
"""The prior that was published."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("deterministic", {}),
    "plain, learning rate 1e-4": ("deterministic", {"tuning": {"learning_rate": 1e-4}}),
    "plain, batch norm trains": ("deterministic", {"tuning": {"freeze_batch_norm": False}}),
    "all sites": ("rank1", {}),
    "all sites, start 0.5 / sqrt(20), prior 0.1": ("rank1", {"init_scale": 0.1118, "prior_scale": 0.1}),
    "all sites, start 0.5 / sqrt(50), prior 0.1": ("rank1", {"init_scale": 0.0707, "prior_scale": 0.1}),
    "last stage": ("rank1-last-stage", {}),
    "last stage, no random signs in a new head": ("rank1-last-stage", {"new_layers": []}),
    "last stage, start 0.1, prior 0.1": ("rank1", {**NARROW, "init_scale": 0.1}),
    "last stage, start 0.2, prior 0.1": ("rank1", {**NARROW, "init_scale": 0.2}),
    "last stage, start 0.3, prior 0.1": ("rank1", {**NARROW, "init_scale": 0.3}),
    "last stage, start 0.3, prior 1": ("rank1", {**STAGE, "init_scale": 0.3, "prior_scale": 1.0}),
    "0.3, spread 0.1, prior 0.3": ("rank1", {**STAGE, "init_scale": 0.3, "posterior_scale": 0.1, "prior_scale": 0.3}),
    "0.3, spread 0.3, prior 0.5": ("rank1", {**STAGE, "init_scale": 0.3, "posterior_scale": 0.3, "prior_scale": 0.5}),
    "0.3, prior 0.1, factors as fast as weights": (
        "rank1", {**NARROW, "init_scale": 0.3, "tuning": {"factor_lr_multiplier": 1.0}}
    ),
    "0.2, prior 0.1, factors 30 times as fast": (
        "rank1", {**NARROW, "init_scale": 0.2, "tuning": {"factor_lr_multiplier": 30.0}}
    ),
    "0.2, prior 0.1, mixture likelihood": (
        "rank1", {**NARROW, "init_scale": 0.2, "tuning": {"likelihood": "mixture"}}
    ),
}  # fmt: skip
"""Method and options of each row."""


def main(
    tasks: Annotated[list[str], typer.Argument(help=f"Some of {', '.join(TASKS)}.")],
    only: Annotated[str, typer.Option(help="Variants, separated by semicolons; empty means all.")] = "",
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for runs.")] = Path("runs/quality/finetuned"),
) -> None:
    torch.set_num_threads(1)
    console = Console(width=400)
    chosen = [name.strip() for name in only.split(";")] if only else list(VARIANTS)
    for task in tasks:
        runs = Runs(task, output, console)
        found = {name: [runs.run(*VARIANTS[name], seed) for seed in range(seeds)] for name in chosen}
        tabulate(runs, found, output / task / "study")


if __name__ == "__main__":
    typer.run(main)
