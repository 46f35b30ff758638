"""How fast is a Bayesian network, beside K plain forwards and beside what others offer?

    python benchmarks/speed/run.py inference --only 'resnet*' --batches 1,8

All contenders of a row run in one process, alternately. A row that was measured before is kept, so an interrupted run
goes on; `--redo` measures anew.
"""

from __future__ import annotations

import fnmatch
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

from benchmarks.rows import Row, measured, show
from benchmarks.speed.contenders import DECODING, INFERENCE, PLAIN_STEP, TRAINING, Contender, baseline_of, ready
from benchmarks.speed.networks import NETWORKS, jobs_of
from benchmarks.speed.timing import alternate


class What(str, Enum):
    """What is timed."""

    inference = "inference"
    training = "training"
    decoding = "decoding"


CONTENDERS: dict[What, dict[str, Contender]] = {
    What.inference: INFERENCE,
    What.training: TRAINING,
    What.decoding: DECODING,
}
MEMBERS = {What.inference: 4, What.training: 4, What.decoding: 8}


def main(
    what: Annotated[What, typer.Argument()],
    output: Annotated[Path, typer.Option(help="Where rows and tables go.")] = Path("runs/speed"),
    only: Annotated[str, typer.Option(help="A glob of networks.")] = "*",
    batches: Annotated[str, typer.Option(help="Numbers of examples.")] = "1,8,32",
    contenders: Annotated[str, typer.Option(help="A glob of contenders beside the baseline.")] = "*",
    rounds: Annotated[int, typer.Option(min=2, help="Times that each contender is timed.")] = 7,
    redo: Annotated[bool, typer.Option("--redo", help="Measure again what was measured before.")] = False,
) -> None:
    """Measure and print the ratios to the baseline: K deterministic forwards, or one step of the plain network."""
    console = Console()
    jobs = jobs_of("llama", "1") if what is What.decoding else jobs_of(only, batches)
    measure = partial(_measured, what, pattern=contenders, rounds=rounds)
    rows = measured(output / f"{what.value}.json", jobs, measure, redo, console)
    baseline = next(iter(CONTENDERS[what]))
    title = f"{what.value}, {MEMBERS[what]} members, time over {baseline}"
    show(output / f"{what.value}.md", title, *_cells(rows, baseline), console)


def _measured(what: What, name: str, batch: int, pattern: str, rounds: int) -> Row:
    available = CONTENDERS[what]
    baseline = next(iter(available))
    chosen = {n: c for n, c in available.items() if n in (baseline, PLAIN_STEP) or fnmatch.fnmatch(n, pattern)}
    members = MEMBERS[what]
    calls, failed = ready(chosen, NETWORKS[name], batch, members)
    if baseline in failed:
        raise RuntimeError(f"the baseline does not run on {name}: {failed[baseline]}")
    timings = alternate(calls, rounds)
    results = {}
    for contender, timing in timings.items():
        other = baseline_of(contender, baseline)
        middle, low, high = timing.over(timings[other])
        results[contender] = {"seconds": timing.median, "over": other, "ratio": middle, "quartiles": [low, high]}
    return {
        "network": name,
        "batch": batch,
        "members": members,
        "rounds": rounds,
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
