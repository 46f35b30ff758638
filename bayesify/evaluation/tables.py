"""What the reports share: values ranked between models, tables for the terminal and for Markdown."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from bayesify.evaluation.metrics import Metric

Cell = tuple[str, bool]
"""The text of a value, and whether it is the best."""

LEGEND = "↑ higher is better, ↓ lower is better; the better value is bold."


def titled(metric: Metric) -> str:
    return metric.title + {"up": " ↑", "down": " ↓", "": ""}[metric.better]


def ranked(values: Sequence[float | None], better: str, digits: int = 4) -> list[Cell]:
    """The cells of values that compare with each other; a lone or equal value is never called best."""
    known = [value for value in values if value is not None]
    best = {"up": max, "down": min}[better](known) if better and len(set(known)) > 1 else None
    return [("–" if v is None else f"{v:.{digits}f}", v is not None and v == best) for v in values]


def rich_table(heading: str, columns: Iterable[str], rows: Iterable[tuple[str, list[Cell], str]]) -> Table:
    """A table of rows (title of a metric, cells, unit)."""
    table = Table(title=heading, title_justify="left", title_style="bold")
    table.add_column("metric", no_wrap=True)
    for column in columns:
        table.add_column(Text(column), justify="right")
    table.add_column("unit", style="dim")
    for title, cells, unit in rows:
        table.add_row(title, *(Text(text, style="bold" if best else "") for text, best in cells), unit)
    return table


def as_text(table: RenderableType, width: int) -> str:
    """What a terminal without colors would show."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(table)
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def markdown_table(head: Sequence[object], rule: str, rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; `rule` is the line below the head, which says how columns are aligned."""
    first, *others = ("| " + " | ".join(map(_escaped, row)) + " |" for row in (head, *rows))
    return [first, rule, *others, ""]


def bold(cells: Iterable[Cell]) -> list[str]:
    """Cells for Markdown."""
    return [f"**{text}**" if best else text for text, best in cells]


def settings_section(settings: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown on how an evaluation was run."""
    if not settings:
        return []
    return ["## Settings", "", *(f"- {_escaped(key)}: {_escaped(value)}" for key, value in settings.items()), ""]


def finite_or_text(value: Any) -> Any:
    """JSON has no infinities, so these are stored as their names, inside of dicts and lists, too."""
    if isinstance(value, dict):
        return {key: finite_or_text(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite_or_text(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _escaped(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
