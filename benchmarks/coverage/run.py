"""How much of timm and transformers converts, how much of each network, and does the result keep the promises?

    python benchmarks/coverage/run.py timm --output runs/coverage --workers 2

Each measured model is one file under the output folder, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table

from bayesify.files import write_json
from bayesify.progress import progress_bar
from benchmarks.coverage.jobs import Job, Row, suite, versions
from benchmarks.coverage.pool import measure_all
from benchmarks.coverage.tables import write_results


class What(str, Enum):
    """Which models; `all` are those of this library, without its rivals."""

    timm = "timm"
    transformers = "transformers"
    rivals = "rivals"
    all = "all"


def main(
    what: Annotated[What, typer.Argument(help="Which models; for rivals see README.md.")],
    output: Annotated[Path, typer.Option(help="Where rows, results.json and table.md go.")] = Path("runs/coverage"),
    workers: Annotated[int, typer.Option(min=1, help="Processes, one model at a time each.")] = 2,
    only: Annotated[str, typer.Option(help="A glob of model names, e.g. 'resnet*'.")] = "*",
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds a model may take.")] = 300.0,
    memory: Annotated[float, typer.Option(min=0.0, help="GB a process may take; 0 is no limit.")] = 8.0,
    fast: Annotated[bool, typer.Option("--fast", help="A few small models, under a minute.")] = False,
    redo: Annotated[
        bool, typer.Option("--redo", help="Measure again what failed or was measured with other versions.")
    ] = False,
) -> None:
    """Measure, write the tables and print the totals."""
    console = Console()
    found = versions()
    for name in ("timm", "transformers") if what is What.all else (what.value,):
        rows = _kept(output, name)
        if redo:
            rows = {job: row for job, row in rows.items() if row["status"] == "ok" and row["versions"] == found}
        try:
            with progress_bar(TextColumn("{task.fields[model]}"), console=console) as progress:
                while todo := [job for job in suite(name).plan(list(rows.values()), only, fast) if job not in rows]:
                    task = progress.add_task(name, total=len(todo), model="")
                    for job, row in measure_all(todo, workers, timeout, memory, output / "logs"):
                        rows[job] = {**vars(job), **row, "versions": found}
                        write_json(job.file(output), rows[job], indent=None)
                        progress.update(task, advance=1, model=f"{job.name}: {row['status']}")
        except KeyboardInterrupt:
            console.print("Interrupted: the tables hold what there is so far, and the same command goes on from here.")
        for title, head, body in write_results(output, name, list(rows.values()), found):
            if title.endswith(("totals", "failures")):
                console.print(_table(title, head, body))


def _kept(output: Path, name: str) -> dict[Job, Row]:
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in (output / "rows" / name).glob("*/*.json")]
    return {Job(row["suite"], row["stage"], row["name"], row["family"]): row for row in rows}


def _table(title: str, head: list[str], body: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in head:
        table.add_column(column, overflow="fold")
    for row in body:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    typer.run(main)
