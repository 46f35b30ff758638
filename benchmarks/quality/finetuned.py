"""Fine-tuned pretrained networks: how good are the probabilities, beside other methods at equal steps?

    python benchmarks/quality/finetuned.py resnet20                       # all rows of a task, then its table
    python benchmarks/quality/finetuned.py clinc-10 --rows rank1 --options '{"init_scale": 0.3}' --seeds 1

Every run is a JSON file; what is there is not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import methods
import others
import torch
import typer
from methods import MEMBERS, Predict, key_of
from results import cell, read, summary, write_table
from rich.console import Console
from safetensors.torch import load_file, save_file
from tasks import TASKS, Batches, Task, batches_of
from torch import Tensor

from bayesify import Predictive
from bayesify.batch import split_batch
from bayesify.calibration.temperature import best_temperature
from bayesify.evaluation.metrics import classification_metrics, ood_metrics
from bayesify.files import write_json

METHODS: dict[str, Callable[..., Predict]] = {
    "deterministic": methods.deterministic,
    "untouched": methods.untouched,
    "rank1": methods.rank1,
    "rank1-last-stage": partial(methods.rank1, sites="last-stage"),
    "batchensemble": methods.batch_ensemble,
    "spread": methods.spread,
    "mc-dropout": others.mc_dropout,
    "swag": others.swag,
    "laplace": others.laplace,
    "mean-field": others.mean_field,
    "lora": others.lora,
}
CLASSIFIED = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "disagreement": "disagreement"}
"""What is measured where labels are known, and what tables call it."""


def labels_of(batches: Batches) -> Tensor:
    return torch.cat([label for batch in batches if (label := split_batch(batch)[2]) is not None])


def predictions(task: Task, predict: Predict) -> dict[str, Tensor]:
    """Outputs for every set of a task."""
    sets = {
        "validation": batches_of(task.validation),
        **task.tests,
        **{f"outside {k}": v for k, v in task.outside.items()},
    }
    with torch.no_grad():
        return {name: predict(batches) for name, batches in sets.items()}


def measure(task: Task, outputs: dict[str, Tensor]) -> dict[str, Any]:
    """Metrics of every set without and with a temperature fitted on validation."""
    truth = {"validation": labels_of(batches_of(task.validation))}
    truth |= {name: labels_of(batches) for name, batches in task.tests.items()}
    temperature = best_temperature(Predictive(outputs["validation"]), truth["validation"])
    result: dict[str, Any] = {"temperature": temperature}
    for kind, divisor in (("plain", 1.0), ("scaled", temperature)):
        rows: dict[str, dict[str, float]] = {}
        for name, labels in truth.items():
            found = classification_metrics(Predictive(outputs[name] / divisor), labels)
            rows[name] = {metric: found[metric] for metric in CLASSIFIED}
        shifted = [rows[name] for name in task.tests if name != "clean"]
        if shifted:
            rows["shifted"] = {m: sum(row[m] for row in shifted) / len(shifted) for m in CLASSIFIED}
        inside = Predictive(outputs["clean"] / divisor)
        for name in task.outside:
            rows[f"outside {name}"] = ood_metrics(inside, Predictive(outputs[f"outside {name}"] / divisor))
        result[kind] = rows
    return result


class Runs:
    """Runs of one task, kept as files."""

    def __init__(self, task: str, folder: Path, console: Console) -> None:
        self.name, self.folder, self.console = task, folder / task, console
        self._task: Task | None = None

    @property
    def task(self) -> Task:
        if self._task is None:
            self._task = TASKS[self.name]()
        return self._task

    def path(self, method: str, options: dict[str, Any], seed: int, ending: str = "json") -> Path:
        return self.folder / "runs" / f"{method}-{key_of(options)}-seed{seed}.{ending}"

    def run(self, method: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
        """The metrics of a run, which is made if it is not there."""
        path = self.path(method, options, seed)
        return read(path) if path.exists() else self.make(method, options, seed)

    def make(self, method: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
        path = self.path(method, options, seed)
        started = time.perf_counter()
        if method == "ensemble":
            outputs = self.ensemble(options, seed)
        else:
            outputs = predictions(self.task, METHODS[method](self.task, seed, **json.loads(json.dumps(options))))
        result = {"method": method, "options": options, "seed": seed, **measure(self.task, outputs)}
        result["seconds"] = round(time.perf_counter() - started, 1)
        if method == "deterministic":
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(outputs, self.path(method, options, seed, "safetensors"))
        write_json(path, result, indent=1)
        self.console.print(f"{self.name} {line(result)}")
        return result

    def ensemble(self, options: dict[str, Any], seed: int) -> dict[str, Tensor]:
        """Four deterministic networks; those of ensemble s are 4s … 4s + 3."""
        found = []
        for own in range(MEMBERS * seed, MEMBERS * (seed + 1)):
            outputs = self.path("deterministic", options, own, "safetensors")
            if not outputs.exists():
                self.make("deterministic", options, own)
            found.append(load_file(outputs))
        return {name: torch.cat([outputs[name] for outputs in found]) for name in found[0]}


def line(result: dict[str, Any]) -> str:
    """A run in a line."""
    parts = [f"{result['method']} {json.dumps(result['options'])} seed {result['seed']} T {result['temperature']:.2f}"]
    for name in ("validation", "clean", "shifted"):
        for kind in ("plain", "scaled"):
            if name in result[kind]:
                row = result[kind][name]
                parts.append(f"{name} {kind}: " + " ".join(f"{row[metric]:.4f}" for metric in CLASSIFIED))
    for name, row in result["plain"].items():
        if name.startswith("outside"):
            parts.append(f"{name}: {row['auroc_entropy']:.3f} {row['auroc_mutual_information']:.3f}")
    return " | ".join([*parts, f"{result['seconds']:.0f} s"])


def main(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TASKS)}.")],
    rows: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}, ensemble.")
    ] = "deterministic,ensemble,rank1",
    options: Annotated[str, typer.Option(help="Options of the methods, as JSON.")] = "{}",
    seeds: Annotated[int, typer.Option(help="Number of seeds, from 0.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder for runs and tables.")] = Path("runs/quality/finetuned"),
    table: Annotated[bool, typer.Option(help="Print and write the table of the default options.")] = True,
) -> None:
    torch.set_num_threads(1)
    console = Console(width=400)
    runs = Runs(task, output, console)
    found: dict[str, list[dict[str, Any]]] = {}
    for method in rows.split(","):
        # Those of all deep ensembles are there anyway.
        for seed in range(MEMBERS * seeds if method == "deterministic" else seeds):
            found.setdefault(method, []).append(runs.run(method, json.loads(options), seed))
    if table:
        tabulate(runs, found)


def tabulate(runs: Runs, rows: dict[str, list[dict[str, Any]]], folder: Path | None = None) -> None:
    """Mean ± standard error over the seeds; "T" is with the temperature of each run's own validation set."""
    first = next(iter(rows.values()))[0]["plain"]
    columns = {
        f"{title}{name}{ending}": (kind, part, metric)
        for part, title in (("clean", ""), ("shifted", "shifted "))
        for metric, name in CLASSIFIED.items()
        for kind, ending in (("plain", ""), ("scaled", ", T"))
        if part in first and (kind == "plain" or metric in ("nll", "ece"))
    }
    for part in first:
        if part.startswith("outside "):
            columns["AUROC " + part.removeprefix("outside ")] = ("plain", part, "auroc_entropy")
            columns["AUROC " + part.removeprefix("outside ") + ", MI"] = ("plain", part, "auroc_mutual_information")
    head = ["", *columns]
    cells = {
        method: [summary([run[k][n][m] for run in found]) for k, n, m in columns.values()]
        for method, found in rows.items()
    }
    body = [[method, *(cell(value) for value in values)] for method, values in cells.items()]
    content = {method: dict(zip(columns, values, strict=True)) for method, values in cells.items()}
    write_table(folder or runs.folder, f"{runs.name}, mean ± standard error", head, body, content, runs.console)


if __name__ == "__main__":
    typer.run(main)
