"""What benchmarks share: rows kept on disk, so that an interrupted run goes on, tables, and fresh processes."""

from __future__ import annotations

import json
import multiprocessing
import platform
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from bayesify.evaluation.tables import markdown_table
from bayesify.files import write_json, write_text
from bayesify.progress import progress_bar

Row = dict[str, Any]
T = TypeVar("T")


def measured(
    file: Path, jobs: Iterable[tuple[Any, ...]], measure: Callable[..., Row], redo: bool, console: Console
) -> list[Row]:
    """The row of every job (the arguments of `measure`), all of them written to `file`.

    Each is also kept beside it, in a folder of that name, and not measured again unless `redo`. A row says which
    processor it is of.
    """
    rows, jobs = [], list(jobs)
    with progress_bar(console=console) as progress:
        task = progress.add_task(file.stem, total=len(jobs))
        for job in jobs:
            kept = file.with_suffix("") / f"{'-'.join(map(str, job))}.json"
            if redo or not kept.exists():
                write_json(kept, {**measure(*job), "processor": processor()}, indent=1)
            rows.append(json.loads(kept.read_text(encoding="utf-8")))
            progress.update(task, advance=1)
    write_json(file, rows, indent=1)
    return rows


def show(file: Path, title: str, head: Sequence[str], body: Sequence[Sequence[str]], console: Console) -> None:
    """Print a table, its first column flush left and the others right, and write it to a Markdown file."""
    table = Table(title=title)
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for cells in body:
        table.add_row(*cells)
    console.print(table)
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    write_text(file, "\n".join([title, "", *markdown_table(head, rule, body)]))


def processor() -> str:
    """What the processor calls itself, and where Linux tells it the family and model that virtual names leave out."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    parts = (said.get("model name", platform.processor()), said.get("cpu family"), said.get("model"))
    return ", ".join(f"{what}{part}" for what, part in zip(("", "family ", "model "), parts, strict=True) if part)


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module gives in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def reason(error: BaseException) -> str:
    """An error in a line, to be kept in a row."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
