"""What the quality benchmarks share: runs kept as files, and cells of mean ± standard error."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from bayesify.files import replacing


def read(path: Path) -> dict[str, Any]:
    """The content of a result file, {} if there is none yet."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(path: Path, content: dict[str, Any], *, indent: int | None = None) -> None:
    """Write a result file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


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
