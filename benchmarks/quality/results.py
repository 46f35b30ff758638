"""What the quality benchmarks share: runs kept as files, and tables of mean ± standard error."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bayesify.files import write_json, write_text


def read(path: Path) -> dict[str, Any]:
    """The content of a result file, {} if there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def summary(values: list[float | None]) -> dict[str, float | None]:
    """Mean and standard error s/√n; None where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "standard_error": None}
    error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return {"mean": statistics.mean(known), "standard_error": error}


def cell(value: dict[str, float | None], digits: int = 4) -> str:
    """mean ± standard error, as a table shows it."""
    if value["mean"] is None:
        return "–"
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def write_table(
    folder: Path, title: str, head: list[str], rows: list[list[str]], content: dict[str, Any], console: Console
) -> None:
    """Print a table and write it as table.md, and all that is known of it as table.json."""
    table = Table(title=title)
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    write_json(folder / "table.json", content, indent=1)
    lines = ["| " + " | ".join(row) + " |\n" for row in (head, *rows)]
    lines.insert(1, "| --- |" + " ---: |" * (len(head) - 1) + "\n")
    write_text(folder / "table.md", "".join(lines))
