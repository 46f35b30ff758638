"""Fit the constants by which bayesify chooses how to compute members, to times on this machine.

    python benchmarks/speed/calibrate.py --rounds 5

Every network is timed on batches of 1, 8 and 32 with 1, 2 and 4 members at once; `bayesify/cost.json` gets the
constants whose predictions are nearest to the times, in relative terms.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares

from bayesify import bayesify, cost
from bayesify.files import write_json
from bayesify.progress import progress_bar
from benchmarks.speed.networks import NETWORKS
from benchmarks.speed.timing import alternate

MEMBERS, AT_ONCE, BATCHES = 4, (1, 2, 4), (1, 8, 32)
Measured = tuple[cost.Workload, float, dict[int, float]]
"""Workload, examples in its units, seconds by the number of members at once."""


def main(
    output: Annotated[Path, typer.Option(help="Where the times go.")] = Path("runs/speed"),
    only: Annotated[str, typer.Option(help="Names of networks, separated by commas.")] = ",".join(NETWORKS),
    batches: Annotated[str, typer.Option(help="Numbers of examples.")] = "1,8,32",
    rounds: Annotated[int, typer.Option(min=3)] = 5,
) -> None:
    console = Console()
    jobs = [(name, int(batch)) for name in only.split(",") for batch in batches.split(",")]
    measured: dict[tuple[str, int], Measured] = {}
    with progress_bar(console=console) as progress:
        task = progress.add_task("calibrate", total=len(jobs))
        for name, batch in jobs:
            found = _times(name, batch, rounds)
            if found is not None:
                measured[name, batch] = found
            progress.update(task, advance=1)
    constants = _fitted(list(measured.values()))
    write_json(cost.FILE, dataclasses.asdict(constants), indent=1)
    rows = [
        {"network": name, "batch": batch, "seconds": seconds, "predicted": _predicted(constants, load, examples)}
        for (name, batch), (load, examples, seconds) in measured.items()
    ]
    write_json(output / "calibration.json", rows, indent=1)
    table = Table(*("network", "batch", *(f"{count} at once" for count in AT_ONCE), "chosen"))
    for row in rows:
        chosen = min(AT_ONCE, key=lambda count, row=row: row["predicted"][count])
        cells = [f"{1e3 * row['seconds'][c]:.1f} ({1e3 * row['predicted'][c]:.1f})" for c in AT_ONCE]
        table.add_row(row["network"], str(row["batch"]), *cells, str(chosen))
    console.print("milliseconds, measured (predicted)")
    console.print(table)


def _times(name: str, batch: int, rounds: int) -> Measured | None:
    network = NETWORKS[name]
    bnn = bayesify(network.build().eval(), members=MEMBERS, task="classification").eval()
    inputs = network.inputs(batch)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    bnn.predict(*args, **kwargs)
    strategy = bnn.passes.strategies.of(args, kwargs)
    if strategy.workload is None:
        return None
    calls: dict[str, Any] = {
        str(count): lambda count=count: bnn.predict(*args, member_chunk=count, **kwargs) for count in AT_ONCE
    }
    times = alternate(calls, rounds)
    examples = strategy.examples(args, kwargs)
    return strategy.workload, examples, {count: times[str(count)].median for count in AT_ONCE}


def _predicted(constants: cost.Costs, load: cost.Workload, examples: float) -> dict[int, float]:
    return {count: load.seconds(MEMBERS, count, examples, True, constants) for count in AT_ONCE}


def _fitted(measured: list[Measured]) -> cost.Costs:
    names = [field.name for field in dataclasses.fields(cost.Costs) if field.name != "kept_bytes"]
    start = cost.costs()

    def errors(logs: np.ndarray) -> np.ndarray:
        constants = cost.Costs(**dict(zip(names, np.exp(logs).tolist(), strict=True)))
        found = []
        for load, examples, seconds in measured:
            predicted = _predicted(constants, load, examples)
            logs_of = np.array([[np.log(predicted[count]), np.log(seconds[count])] for count in AT_ONCE])
            found.append(0.3 * (logs_of[:, 0] - logs_of[:, 1]).mean(keepdims=True))  # how long it takes at all
            centered = logs_of - logs_of.mean(0)
            found.append(centered[:, 0] - centered[:, 1])  # which of them takes least, by which it is chosen
        # Where times say nothing about a constant, it stays near where it was.
        return np.concatenate([*found, 0.1 * (logs - before)])

    before = np.log([getattr(start, name) for name in names])
    fit = least_squares(errors, before)
    return cost.Costs(**dict(zip(names, [float(f"{value:.3g}") for value in np.exp(fit.x)], strict=True)))


if __name__ == "__main__":
    typer.run(main)
