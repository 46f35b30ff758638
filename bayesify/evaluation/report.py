"""What an evaluation found, as an object, a table, a JSON file and a page with pictures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from bayesify.errors import FormatError
from bayesify.evaluation import tables
from bayesify.evaluation.metrics import METRICS, Metric
from bayesify.evaluation.scores import answers, score
from bayesify.files import write_json, write_text
from bayesify.predictive import Predictive

FORMAT_VERSION = 1


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
        write_json(folder / "report.json", self._plain(), allow_nan=False)
        write_text(folder / "report.md", self._markdown(pictures))

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
        rows = [(tables.titled(metric), cells, metric.unit) for metric, cells in self._rows()]
        return tables.rich_table(self._heading(), self.metrics, rows)

    def __str__(self) -> str:
        return tables.as_text(self, width=100)

    def _heading(self) -> str:
        return f"{self.num_examples} examples; members {self.members}, samples {self.samples}, seed {self.seed}"

    def _rows(self) -> list[tuple[Metric, list[tables.Cell]]]:
        """The metrics that a model has, with a cell for every model."""
        rows = []
        for key, metric in METRICS.items():
            values = [{**self.metrics[name], **self.ood.get(name, {})}.get(key) for name in self.metrics]
            if any(value is not None for value in values):
                rows.append((metric, tables.ranked(values, metric.better)))
        return rows

    def _plain(self) -> dict[str, Any]:
        """What report.json holds."""
        stored = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("predictions", "outside")}
        numbers = {name: tables.finite_or_text(stored[name]) for name in ("metrics", "ood")}
        return {"format_version": FORMAT_VERSION, **stored, **numbers}

    def _draw(self, folder: Path) -> dict[str, str]:
        """Write the pictures; {file name: caption}."""
        drawable = {name: answers(*pair) for name, pair in self.predictions.items() if pair[0].has_classes}
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
        rule = "|---|" + "---:|" * len(self.metrics) + "---|---|"
        rows = [
            [tables.titled(metric), *tables.bold(cells), metric.unit, metric.meaning] for metric, cells in self._rows()
        ]
        lines = ["# Evaluation", "", f"{self._heading()}.", ""]
        lines += [*tables.markdown_table(["metric", *self.metrics, "unit", "meaning"], rule, rows), tables.LEGEND, ""]
        for file, caption in pictures.items():
            lines += [f"![{file.removesuffix('.png').replace('_', ' ')}]({file})", "", caption, ""]
        if self.classes:
            hardest = [[row["class"], row["examples"], f"{row['accuracy']:.4f}"] for row in self.classes[:10]]
            lines += ["## Hardest classes", ""]
            lines += tables.markdown_table(["class", "examples", "accuracy"], "|---|---:|---:|", hardest)
        return "\n".join(lines + tables.settings_section(self.settings))


def _numbers(stored: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    return {model: {key: float(value) for key, value in values.items()} for model, values in stored.items()}
