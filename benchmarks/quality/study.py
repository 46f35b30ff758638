"""Which start, sites, noise and objective? Every variant of the conversion and the fine-tune, beside the plain one.

python benchmarks/quality/study.py flowers cells                       # all variants
python benchmarks/quality/study.py clinc-10 --only "plain; stage"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from finetuned import Runs
from rich.console import Console
from tasks import TASKS

STAGE = {"sites": "last-stage"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("deterministic", {}),
    "plain, batch norm trains": ("deterministic", {"tuning": {"freeze_batch_norm": False}}),
    "plain, 1e-4": ("deterministic", {"tuning": {"learning_rate": 1e-4}}),
    "stage 0.1": ("rank1", {**STAGE, "init_scale": 0.1}),
    "stage 0.3": ("rank1", {**STAGE, "init_scale": 0.3}),
    "stage 0.3, spread 0.1": ("rank1", {**STAGE, "init_scale": 0.3, "posterior_scale": 0.1, "prior_scale": 0.3}),
    "stage 0.3, spread 0.3": ("rank1", {**STAGE, "init_scale": 0.3, "posterior_scale": 0.3, "prior_scale": 0.5}),
    "stage 0.3, factors slow": ("rank1", {**STAGE, "init_scale": 0.3, "tuning": {"factor_lr_multiplier": 1.0}}),
    "stage": ("rank1", STAGE),
    "stage 0.2": ("rank1", {**STAGE, "init_scale": 0.2}),
    "stage 0.2, factors 30": ("rank1", {**STAGE, "init_scale": 0.2, "tuning": {"factor_lr_multiplier": 30.0}}),
    "stage 0.2, mixture": ("rank1", {**STAGE, "init_scale": 0.2, "tuning": {"likelihood": "mixture"}}),
    "all": ("rank1", {"sites": "all"}),
}


def main(
    tasks: Annotated[list[str], typer.Argument(help=f"Some of {', '.join(TASKS)}.")],
    only: Annotated[str, typer.Option(help="Variants, separated by semicolons; empty means all.")] = "",
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder for runs.")] = Path("runs/quality/finetuned"),
) -> None:
    torch.set_num_threads(1)
    chosen = [name.strip() for name in only.split(";")] if only else list(VARIANTS)
    for task in tasks:
        runs = Runs(task, output, Console(width=400))
        for seed in range(seeds):
            for name in chosen:
                method, options = VARIANTS[name]
                if task == "mortality":  # a network without stages
                    options = {key: value for key, value in options.items() if key != "sites"}
                runs.run(method, options, seed)


if __name__ == "__main__":
    typer.run(main)
