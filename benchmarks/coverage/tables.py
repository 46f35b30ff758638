"""What the rows say together: totals, a table by family, every failure and every reason for leaving a weight out."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from bayesify.files import write_json, write_text
from benchmarks.coverage.jobs import STATUSES, Row

Table = tuple[str, list[str], list[list[str]]]
"""Title, column names, rows."""


def write_results(output: Path, suite: str, rows: list[Row], versions: dict[str, str]) -> list[Table]:
    """Write results.json and table.md of one suite and give the tables back for the screen."""
    rows = [row for row in rows if row["stage"] != "census"]
    rows = sorted(rows, key=lambda row: (row["stage"], row["family"], row["name"]))
    tables: list[Table] = []
    for stage in sorted({row["stage"] for row in rows}):
        tables += _stage_tables(f"{suite}, {stage}", [row for row in rows if row["stage"] == stage])
    folder = output / suite
    write_json(folder / "results.json", {"versions": versions, "rows": rows}, indent=1)
    heading = ", ".join(f"{name} {version}" for name, version in versions.items())
    write_text(folder / "table.md", "\n".join([f"Measured with {heading}.\n", *map(_markdown, tables)]))
    return tables


def _stage_tables(title: str, rows: list[Row]) -> list[Table]:
    tables = [_totals(title, rows), _by_family(title, rows), _failures(title, rows), _reasons(title, rows)]
    return [table for table in tables if table[2]]


def _totals(title: str, rows: list[Row]) -> Table:
    counts = Counter(row["status"] for row in rows)
    lines: dict[str, Any] = {"models": len(rows), "families": len({row["family"] for row in rows})}
    lines |= {status: counts[status] for status in STATUSES}
    shares = _values(rows, "share")
    if shares:
        lines |= {"share converted, median": _percent(statistics.median(shares)), "lowest": _percent(min(shares))}
        lines["everything converted"] = sum(share == 1.0 for share in shares)
    lines |= {
        "sites": f"{sum(row.get('sites', 0) for row in rows):,}",
        "hours of all processes": f"{sum(row.get('seconds', 0.0) for row in rows) / 3600:.2f}",
        "sets of versions": len({str(row.get("versions")) for row in rows}),
    }
    return f"{title}: totals", ["", "number"], [[name, str(value)] for name, value in lines.items()]


def _by_family(title: str, rows: list[Row]) -> Table:
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row["family"]].append(row)
    head = ["family", "models", "ok", "sites", "lowest share", "identity", "not ok"]
    body = []
    for family, members in sorted(families.items()):
        shares, errors, sites = (_values(members, key) for key in ("share", "identity", "sites"))
        failed = Counter(row["status"] for row in members if row["status"] != "ok")
        body.append(
            [
                family,
                str(len(members)),
                str(sum(row["status"] == "ok" for row in members)),
                f"{min(sites):.0f}–{max(sites):.0f}" if sites else "",
                _percent(min(shares)) if shares else "",
                f"{max(errors):.1e}" if errors else "",
                ", ".join(f"{status} {count}" for status, count in failed.items()),
            ]
        )
    return f"{title}: families", head, body


def _failures(title: str, rows: list[Row]) -> Table:
    body = [
        [row["name"], row["status"], row.get("with_inputs", ""), first_line(row.get("error", ""))]
        for row in rows
        if row["status"] != "ok"
    ]
    return f"{title}: failures", ["model", "status", "given its inputs", "error"], body


def _reasons(title: str, rows: list[Row]) -> Table:
    """Every reason, with who owns the weights and what they are called there."""
    models: dict[tuple[str, str], set[str]] = defaultdict(set)
    names: dict[tuple[str, str], set[str]] = defaultdict(set)
    parameters: Counter[tuple[str, str]] = Counter()
    entries: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for group in row.get("skipped", []):
            key = group["reason"], group["owner"]
            models[key].add(row["name"])
            names[key].add(group["name"])
            entries[key] += group["count"]
            parameters[key] += group["parameters"]
    head = ["reason", "owner", "names", "models", "entries", "parameters", "example"]
    body = []
    for key in sorted(models, key=lambda key: (key[0], -len(models[key]), key[1])):
        numbers = [f"{value:,}" for value in (len(models[key]), entries[key], parameters[key])]
        body.append([*key, ", ".join(sorted(names[key])[:8]), *numbers, min(models[key], key=len)])
    return f"{title}: not converted", head, body


def first_line(text: str, length: int = 200) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= length else line[: length - 1] + "…"


def _values(rows: list[Row], key: str) -> list[float]:
    return [row[key] for row in rows if isinstance(row.get(key), (int, float))]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _markdown(table: Table) -> str:
    title, head, rows = table
    lines = [f"## {title}\n", _line(head), _line(["---"] * len(head)), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
