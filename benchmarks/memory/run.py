"""How much memory does a Bayesian network take, beside the plain network and beside what others offer?

    python benchmarks/memory/run.py training --only 'resnet*' --batches 8

Every contender runs in a process of its own. A row that was measured before is kept, so an interrupted run goes on;
`--redo` measures anew.
"""

from __future__ import annotations

import os
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import typer
from rich.console import Console

from benchmarks.memory.peak import peak_of
from benchmarks.rows import Row, in_fresh_process, measured, reason, show
from benchmarks.speed.contenders import INFERENCE, PLAIN_STEP, TRAINING, Contender, baseline_of, ours
from benchmarks.speed.networks import fits, jobs_of


class What(str, Enum):
    """What is measured."""

    inference = "inference"
    training = "training"


CONTENDERS: dict[What, dict[str, Contender]] = {
    What.inference: {
        **{name: INFERENCE[name] for name in ("floor", "bayesify", "deep ensemble", "vmap")},
        "bayesify, one member at a time": ours(member_chunk=1),
    },
    What.training: TRAINING,
}
CALLS = {What.inference: 1, What.training: 3}
"""The first training step makes gradients and the optimizer's state; the second has them from its beginning."""


def main(
    what: Annotated[What, typer.Argument()],
    output: Annotated[Path, typer.Option(help="Where rows and tables go.")] = Path("runs/memory"),
    only: Annotated[str, typer.Option(help="A glob of networks.")] = "*",
    batches: Annotated[str, typer.Option(help="Numbers of examples.")] = "8",
    contenders: Annotated[str, typer.Option(help="A glob of contenders beside the baseline.")] = "*",
    members: Annotated[int, typer.Option(min=1)] = 4,
    redo: Annotated[bool, typer.Option("--redo", help="Measure again what was measured before.")] = False,
) -> None:
    """Measure and print peaks, and their ratios to the baseline: plain forwards, or a step of the plain network."""
    console = Console()
    file = output / f"{what.value}-{members}.json"
    rows = measured(file, jobs_of(only, batches), partial(_measured, what, members, contenders), redo, console)
    title = f"{what.value}, {members} members, resident memory in MiB, and over {next(iter(CONTENDERS[what]))}"
    show(file.with_suffix(".md"), title, *_cells(rows), console)


def _measured(what: What, members: int, pattern: str, name: str, batch: int) -> Row:
    baseline = next(iter(CONTENDERS[what]))
    results, failed = {}, {}
    for contender in CONTENDERS[what]:
        if contender not in (baseline, PLAIN_STEP) and not fits(contender, pattern):
            continue
        try:
            results[contender] = in_fresh_process(_peak, what, contender, name, batch, members)
        except Exception as error:  # whatever another library raises is its answer
            failed[contender] = reason(error)
    if baseline in failed:
        raise RuntimeError(f"the baseline does not run on {name}: {failed[baseline]}")
    return {
        "network": name,
        "batch": batch,
        "members": members,
        "calls": CALLS[what],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "baseline": baseline,
        "results": results,
        "failed": failed,
    }


def _peak(what: What, contender: str, name: str, batch: int, members: int) -> dict[str, float]:
    return peak_of(CONTENDERS[what][contender], name, batch, members, CALLS[what])


def _cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table."""
    body = []
    for row in rows:
        job = [row["network"], str(row["batch"])]
        for contender, sizes in row["results"].items():
            other = row["results"][baseline_of(contender, row["baseline"])]
            parts = [f"{sizes['built'] - sizes['libraries']:.0f}", f"{sizes['peak'] - sizes['built']:.0f}"]
            ratios = [
                f"{(sizes['peak'] - sizes[start]) / (other['peak'] - other[start]):.2f}"
                for start in ("built", "libraries")
            ]
            body.append([*job, contender, *parts, *ratios, f"{sizes['peak'] / other['peak']:.2f}"])
        body += [[*job, contender, *[""] * 4, "fails"] for contender in row["failed"]]
    return ["network", "batch", "contender", "network", "work", "work ×", "both ×", "process ×"], body


if __name__ == "__main__":
    typer.run(main)
