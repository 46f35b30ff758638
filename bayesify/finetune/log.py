"""What training shows: a progress bar with an estimate, a JSONL log, and Accelerate's trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.progress import TextColumn

from bayesify.progress import progress_bar


class TrainingLog:
    """Rows of numbers, kept in memory, appended to `log.jsonl` and sent to the trackers.

    Args:
        accelerator: only its main process writes.
        path: the JSONL file, or `None`.
        first_step: rows of later steps, left by an interrupted run, are dropped from the file.
    """

    def __init__(self, accelerator: Accelerator, path: Path | None, first_step: int, total: int, show: bool) -> None:
        self.accelerator = accelerator
        self.path = path if accelerator.is_main_process else None
        self.rows: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            rows = map(_read_row, self.path.read_text().splitlines())
            self.rows = [row for row in rows if row is not None and row["step"] <= first_step] if first_step else []
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        shown = show and accelerator.is_main_process
        self.progress = progress_bar(TextColumn("{task.fields[numbers]}"), disable=not shown)
        self.task = self.progress.add_task("fine-tune", total=total, completed=first_step, numbers="")

    def __enter__(self) -> TrainingLog:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, numbers: str) -> None:
        self.progress.update(self.task, advance=1, numbers=numbers)

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        self.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])


def _read_row(line: str) -> dict[str, Any] | None:
    """A line of the log, or `None` for one that a killed process left unfinished."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
