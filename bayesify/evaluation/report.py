"""What an evaluation found, as an object, a table, a JSON file and a page with pictures."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from bayesify.errors import FormatError
from bayesify.evaluation.metrics import METRICS, Metric
from bayesify.evaluation.scores import score
from bayesify.files import replacing
from bayesify.predictive import Predictive

FORMAT_VERSION = 1
ARROWS = {"up": "↑", "down": "↓", "": ""}


@dataclass
class Evaluation:
    """Numbers of one or more models on the same data.

    Attributes:
        metrics: {model name: {metric: value}}; `METRICS` holds the unit and meaning of each.
        num_examples: B.
        members: K of the main model (the first).
        samples: S of the main model.
        seed: of the draws.
        ood: {model name: {"auroc_entropy", "auroc_mutual_information"}}, empty without such data.
        classes: rows {"class", "examples", "accuracy"} of the main model, hardest first; empty without names.
        settings: how the evaluation was run.
        predictions: {model name: (predictive, targets)}, for the pictures; not saved.
        outside: the main model's predictive of the out-of-distribution data; not saved.
    """

    metrics: dict[str, dict[str, float]]
    num_examples: int
    members: int
    samples: int
    seed: int
    ood: dict[str, dict[str, float]] = field(default_factory=dict)
    classes: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    predictions: dict[str, tuple[Predictive, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    outside: Predictive | None = field(default=None, repr=False, compare=False)

    def save(self, folder: str | Path) -> None:
        """Write report.json, report.md and, for classification, its pictures. Each file is replaced whole."""
        folder = Path(folder)
        pictures = self._draw(folder)
        _write(folder / "report.json", json.dumps(self._plain(), indent=2, allow_nan=False) + "\n")
        _write(folder / "report.md", self._markdown(pictures))

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read the report.json of a folder. Predictions are not stored, so it draws no pictures.

        Raises:
            FormatError: the file is missing, not a report, or of a newer format.
        """
        path = Path(folder) / "report.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot read {path}: {error}. Give the folder an evaluation was saved to.") from error
        version = stored.pop("format_version", None) if isinstance(stored, dict) else None
        if version != FORMAT_VERSION:
            raise FormatError(f"{path}: format_version is {version!r}; expected {FORMAT_VERSION}.")
        try:
            stored["metrics"], stored["ood"] = _numbers(stored["metrics"]), _numbers(stored["ood"])
            return cls(**stored)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path}: not an evaluation report ({error}).") from error

    def __rich__(self) -> Table:
        table = Table(title=self._heading(), title_justify="left", title_style="bold")
        table.add_column("metric", no_wrap=True)
        for name in self.metrics:
            table.add_column(Text(name), justify="right")
        table.add_column("unit", style="dim")
        for metric, values in self._rows():
            title = f"{metric.title} {ARROWS[metric.better]}".rstrip()
            table.add_row(title, *(Text(text, style="bold" if best else "") for text, best in values), metric.unit)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False, legacy_windows=False)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]

    def _heading(self) -> str:
        return f"{self.num_examples} examples; members {self.members}, samples {self.samples}, seed {self.seed}"

    def _rows(self) -> list[tuple[Metric, list[tuple[str, bool]]]]:
        """For each metric, the (text, is the best) of every model; a lone model is never called best."""
        rows = []
        for key, metric in METRICS.items():
            values = [{**self.metrics[name], **self.ood.get(name, {})}.get(key) for name in self.metrics]
            known = [value for value in values if value is not None]
            if not known:
                continue
            best = {"up": max(known), "down": min(known), "": None}[metric.better]
            ranked = len(known) > 1 and len(set(known)) > 1
            rows.append(
                (
                    metric,
                    [("–" if v is None else f"{v:.4f}", ranked and v is not None and v == best) for v in values],
                )
            )
        return rows

    def _plain(self) -> dict[str, Any]:
        """What report.json holds. JSON has no infinities, so these are stored as their names."""
        stored = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("predictions", "outside")}
        for name in ("metrics", "ood"):
            stored[name] = {
                model: {key: value if math.isfinite(value) else str(value) for key, value in values.items()}
                for model, values in stored[name].items()
            }
        return {"format_version": FORMAT_VERSION, **stored}

    def _draw(self, folder: Path) -> dict[str, str]:
        """Write the pictures; {file name: caption}."""
        drawable = {name: pair for name, pair in self.predictions.items() if pair[0].task == "classification"}
        if not drawable:
            return {}
        from bayesify.evaluation import plots  # matplotlib only when there is something to draw

        name, (predictive, targets) = next(iter(drawable.items()))
        plots.reliability_diagram(drawable, folder / "reliability.png")
        plots.risk_coverage(drawable, folder / "risk_coverage.png")
        plots.uncertainty_histogram(
            predictive, self.outside, folder / "uncertainty.png", score(predictive, targets).correct
        )
        return {
            "reliability.png": "Reliability: accuracy against confidence. The closer the bars are to the "
            "diagonal, the better the confidence can be taken at its word.",
            "risk_coverage.png": "Risk and coverage: the error rate if only the most confident are answered.",
            "uncertainty.png": f"Doubt of {name} in nats, for examples it gets right and wrong"
            + (", and for data unlike the training data." if self.outside is not None else "."),
        }

    def _markdown(self, pictures: dict[str, str]) -> str:
        names = [_cell(name) for name in self.metrics]
        lines = ["# Evaluation", "", f"{self._heading()}.", ""]
        lines += ["| metric | " + " | ".join(names) + " | unit | meaning |"]
        lines += ["|---|" + "---:|" * len(names) + "---|---|"]
        for metric, values in self._rows():
            shown = " | ".join(f"**{text}**" if best else text for text, best in values)
            title = f"{metric.title} {ARROWS[metric.better]}".rstrip()
            lines += [f"| {title} | {shown} | {metric.unit} | {_cell(metric.meaning)} |"]
        lines += ["", "↑ higher is better, ↓ lower is better; the better value is bold.", ""]
        for file, caption in pictures.items():
            lines += [f"![{file.removesuffix('.png').replace('_', ' ')}]({file})", "", caption, ""]
        if self.classes:
            lines += ["## Hardest classes", "", "| class | examples | accuracy |", "|---|---:|---:|"]
            lines += [f"| {_cell(r['class'])} | {r['examples']} | {r['accuracy']:.4f} |" for r in self.classes[:10]]
            lines += [""]
        if self.settings:
            lines += ["## Settings", ""]
            lines += [f"- {_cell(key)}: {_cell(value)}" for key, value in self.settings.items()]
            lines += [""]
        return "\n".join(lines)


def _cell(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _numbers(stored: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {model: {key: float(value) for key, value in values.items()} for model, values in stored.items()}


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
