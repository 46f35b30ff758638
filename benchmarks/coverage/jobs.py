"""What the harness passes around: a model to measure, and the row that comes out of it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

Row = dict[str, Any]
"""One measured model, ready for JSON; `checks` says what is in it."""

STATUSES = ("ok", "build", "base", "convert", "identity", "probe", "timeout", "crash")
"""How far a model got: the first step that failed, or "ok"."""

SUITES = {"timm": "timm_models", "transformers": "transformers_suite", "rivals": "rivals"}
"""{what the command is given: the module of this folder that knows the models}."""


@dataclass(frozen=True)
class Job:
    """One measurement of one model; workers get it by pickle.

    Attributes:
        suite: a key of `SUITES`.
        stage: which measurement: "meta" (conversion without weights), "full" (every check), or a rival's name.
        name: the model.
        family: what the tables group it by.
    """

    suite: str
    stage: str
    name: str
    family: str

    def file(self, output: Path) -> Path:
        """Where its row is kept."""
        return output / "rows" / self.suite / self.stage / f"{self.name.replace('/', '--')}.json"


class Suite(Protocol):
    """What a module named in `SUITES` offers."""

    def plan(self, rows: list[Row], only: str, fast: bool) -> list[Job]:
        """The jobs whose model fits the glob `only`, done ones included.

        Asked again after each round, so that what to do next may depend on the rows so far.
        """
        ...

    def measure(self, job: Job) -> Row:
        """Run in a worker process. May raise; that is a row with the status "build"."""
        ...


def suite(name: str) -> Suite:
    return cast(Suite, importlib.import_module(f"benchmarks.coverage.{SUITES[name]}"))


def versions() -> dict[str, str]:
    """What a row depends on: the libraries, and a digest of the code that converts."""
    import timm
    import torch
    import transformers

    import bayesify

    root = Path(bayesify.__file__).parent
    digest = hashlib.sha256()
    parts = ("convert.py", "model.py", "batch.py", "tasks.py", "graph/*.py", "layers/*.py")
    for path in sorted(p for part in parts for p in root.glob(part)):
        digest.update(path.read_bytes())
    found = {module.__name__: str(module.__version__) for module in (torch, timm, transformers)}
    return {**found, "bayesify": digest.hexdigest()[:10]}


class FailedStepError(Exception):
    """A step failed; the row says which and how."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def step(status: str) -> Iterator[None]:
    try:
        yield
    except (FailedStepError, MemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        raise FailedStepError(status, f"{type(error).__name__}: {error}") from error
