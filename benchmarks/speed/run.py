"""How fast is a Bayesian network, beside K plain forwards and beside what others offer?

    python benchmarks/speed/run.py inference --only 'resnet*' --batches 1,8

All contenders of a row run in one process, alternately. A row that was measured before is kept, so an interrupted run
goes on; `--redo` measures anew.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import typer
from rich.console import Console

from benchmarks.rows import Row, measured, show
from benchmarks.speed.contenders import (
    COMPILED,
    DECODING,
    INFERENCE,
    LATE,
    PLAIN_STEP,
    TRAINING,
    Contender,
    baseline_of,
    ready,
)
from benchmarks.speed.networks import NETWORKS, fits, jobs_of
from benchmarks.speed.timing import alternate


class What(str, Enum):
    """What is timed."""

    inference = "inference"
    compiled = "compiled"
    late = "late"
    training = "training"
    decoding = "decoding"


@dataclass(frozen=True)
class Suite:
    """What is timed with how many members, on which networks. The first contender is the baseline."""

    contenders: dict[str, Contender]
    members: int
    networks: str = "*"
    batches: str = "1,8,32"

    @property
    def baseline(self) -> str:
        return next(iter(self.contenders))


SUITES = {
    What.inference: Suite(INFERENCE, 4),
    What.compiled: Suite(COMPILED, 4, "resnet50,vit_small,minilm", "1,8"),
    What.late: Suite(LATE, 8, ",".join(name for name, network in NETWORKS.items() if network.late), "1,8"),
    What.training: Suite(TRAINING, 4, batches="8"),
    What.decoding: Suite(DECODING, 8, "llama", "1"),
}


def main(
    what: Annotated[What, typer.Argument()],
    output: Annotated[Path, typer.Option(help="Where rows and tables go.")] = Path("runs/speed"),
    only: Annotated[str | None, typer.Option(help="Globs of networks, between commas.")] = None,
    batches: Annotated[str | None, typer.Option(help="Numbers of examples, between commas.")] = None,
    contenders: Annotated[str, typer.Option(help="Globs of contenders beside the baseline, between commas.")] = "*",
    rounds: Annotated[int, typer.Option(min=3, help="Times that each contender is timed.")] = 7,
    seconds: Annotated[float, typer.Option(help="A row gets no more rounds after this, but three.")] = 300.0,
    redo: Annotated[bool, typer.Option("--redo", help="Measure again what was measured before.")] = False,
) -> None:
    """Measure and print the ratios to the baseline: K deterministic forwards, or one step of the plain network."""
    console = Console()
    suite = SUITES[what]
    jobs = [job for job in jobs_of(suite.networks, batches or suite.batches) if fits(job[0], only or "*")]
    if not jobs:
        raise typer.BadParameter(f"no network fits {only!r}; there are {', '.join(NETWORKS)}.", param_hint="--only")
    measure = partial(_measured, suite, pattern=contenders, rounds=rounds, seconds=seconds)
    rows = measured(output / f"{what.value}.json", jobs, measure, redo, console)
    title = f"{what.value}, {suite.members} members, time over {suite.baseline}"
    show(output / f"{what.value}.md", title, *_cells(rows, suite.baseline), console)


def _measured(suite: Suite, name: str, batch: int, pattern: str, rounds: int, seconds: float) -> Row:
    baseline, members = suite.baseline, suite.members
    chosen = {n: c for n, c in suite.contenders.items() if n in (baseline, PLAIN_STEP) or fits(n, pattern)}
    calls, failed = ready(chosen, NETWORKS[name], batch, members)
    if baseline in failed:
        raise RuntimeError(f"the baseline does not run on {name}: {failed[baseline]}")
    timings = alternate(calls, rounds, seconds)
    results = {}
    for contender, timing in timings.items():
        other = baseline_of(contender, baseline)
        middle, low, high = timing.over(timings[other])
        results[contender] = {"seconds": timing.median, "over": other, "ratio": middle, "quartiles": [low, high]}
    return {
        "network": name,
        "batch": batch,
        "members": members,
        "rounds": len(timings[baseline].seconds),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "baseline": baseline,
        "results": results,
        "failed": failed,
    }


def _cells(rows: list[Row], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table."""
    names = list(dict.fromkeys(name for row in rows for name in (*row["results"], *row["failed"])))
    names.remove(baseline)
    body = []
    for row in rows:
        cells = [row["network"], str(row["batch"]), f"{1e3 * row['results'][baseline]['seconds']:.1f}"]
        for name in names:
            result = row["results"].get(name)
            if result is None:
                cells.append("fails" if name in row["failed"] else "")
            else:
                low, high = result["quartiles"]
                cells.append(f"{result['ratio']:.2f} ({low:.2f}–{high:.2f})")
        body.append(cells)
    return ["network", "batch", f"{baseline}, ms", *names], body


if __name__ == "__main__":
    typer.run(main)
