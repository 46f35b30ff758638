"""What an evaluation on corrupted images found: means over sets, the mCE, a table, files and a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from bayesify.errors import ConfigError, FormatError
from bayesify.evaluation import tables
from bayesify.evaluation.corrupted import SEVERITIES
from bayesify.evaluation.metrics import METRICS
from bayesify.files import read_json, write_json, write_text

FORMAT_VERSION = 1
ROW_KEYS = ("model", "corruption", "severity")
MAIN = ("nll", "accuracy", "ece")

# Mean over the five severities of AlexNet's top-1 error on ImageNet-C (Hendrycks and Dietterich, ICLR 2019,
# https://arxiv.org/abs/1903.12261), in the digits of the authors' repository, https://github.com/hendrycks/robustness.
ALEXNET_ERRORS: dict[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


@dataclass
class CorruptionReport:
    """Numbers of one or more models on the same corrupted sets.

    Attributes:
        sets: one row for each model, corruption and severity (0 is clean): {"model", "corruption", "severity",
            "examples"} and the metrics of `METRICS`.
        settings: how the evaluation was run.
        reference_errors: {corruption: mean error of the reference network}, empty without one.
    """

    sets: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    reference_errors: dict[str, float] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row["model"] for row in self.sets))

    @property
    def summary(self) -> dict[str, dict[str, Any]]:
        """{model: {"clean", "corrupted", "severities", "corruptions", "mce"}}.

        "clean" holds the metrics at severity 0 and "corrupted" their means over all other sets: cNLL, cA, cECE and so
        on as Dusenberry et al. (2020) report them. Each set's ECE is computed by itself; sets are never pooled.
        "severities" and "corruptions" hold the means over the sets of each. "mce" is there with reference errors and
        all five severities: 100 × mean over corruptions of (mean error over severities / reference error).
        """
        return {model: self._summary([row for row in self.sets if row["model"] == model]) for model in self.models}

    def _summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        corrupted = [row for row in rows if row["severity"]]
        severities = sorted({row["severity"] for row in corrupted})
        corruptions = list(dict.fromkeys(row["corruption"] for row in corrupted))
        found: dict[str, Any] = {
            "clean": _means(row for row in rows if not row["severity"]),
            "corrupted": _means(corrupted),
            "severities": {s: _means(row for row in corrupted if row["severity"] == s) for s in severities},
            "corruptions": {c: _means(row for row in corrupted if row["corruption"] == c) for c in corruptions},
        }
        complete = len(corrupted) == len(corruptions) * len(SEVERITIES)
        if self.reference_errors and corrupted and complete:
            ratios = [(1 - found["corruptions"][c]["accuracy"]) / self.reference_errors[c] for c in corruptions]
            found["mce"] = 100 * sum(ratios) / len(ratios)
        return found

    def save(self, folder: str | Path) -> None:
        """Write corruptions.json, corruptions.md and corruptions.png. Each file is replaced whole."""
        from bayesify.evaluation import plots  # matplotlib only when there is something to draw

        folder = Path(folder)
        plots.corruption_boxes(self.sets, folder / "corruptions.png")
        stored = {
            "format_version": FORMAT_VERSION,
            "settings": self.settings,
            "reference_errors": self.reference_errors,
            "summary": tables.finite_or_text(self.summary),
            "sets": tables.finite_or_text(self.sets),
        }
        write_json(folder / "corruptions.json", stored, allow_nan=False)
        write_text(folder / "corruptions.md", self._markdown())

    @classmethod
    def load(cls, folder: str | Path) -> CorruptionReport:
        """Read the corruptions.json of a folder; its summary is computed anew.

        Raises:
            FormatError: the file is missing, not a report, or of a newer format.
        """
        path = Path(folder) / "corruptions.json"
        stored = read_json(path, "give the folder an evaluation on corruptions was saved to")
        if stored.get("format_version") != FORMAT_VERSION:
            raise FormatError(f"{path}: format_version is {stored.get('format_version')!r}; expected {FORMAT_VERSION}.")
        try:
            reference = {name: float(error) for name, error in stored["reference_errors"].items()}
            return cls([read_row(row) for row in stored["sets"]], dict(stored["settings"]), reference)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(f"{path}: not a report on corruptions ({error}).") from error

    def __rich__(self) -> Table:
        return tables.rich_table(self._heading(), self._columns(), self._rows())

    def __str__(self) -> str:
        return tables.as_text(self, width=120)

    def _heading(self) -> str:
        rows = [row for row in self.sets if row["model"] == self.models[0]]
        corruptions = {row["corruption"] for row in rows if row["severity"]}
        severities = sorted({row["severity"] for row in rows if row["severity"]})
        counts = sorted({row["examples"] for row in rows})
        examples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        listed = ", ".join(map(str, severities))
        return f"{examples} examples a set; {len(corruptions)} corruptions at severity {listed or '–'}"

    def _columns(self) -> list[str]:
        return [f"{model}, {part}" for part in ("clean", "corrupted") for model in self.models]

    def _rows(self) -> list[tuple[str, list[tables.Cell], str]]:
        """(title, a cell for each column, unit) of each metric; clean and corrupted values are ranked apart."""
        summary = self.summary
        rows = []
        for key, metric in METRICS.items():
            cells: list[tables.Cell] = []
            for part in ("clean", "corrupted"):
                cells += tables.ranked([summary[model][part].get(key) for model in self.models], metric.better)
            if any(text != "–" for text, _ in cells):
                rows.append((tables.titled(metric), cells, metric.unit))
        mce = [summary[model].get("mce") for model in self.models]
        if any(value is not None for value in mce):
            rows.append(("mCE ↓", [("–", False)] * len(mce) + tables.ranked(mce, "down", 2), "% of the reference"))
        return rows

    def _markdown(self) -> str:
        lines = ["# Corruptions", "", f"{self._heading()}.", ""]
        lines += _table(
            ["metric", *self._columns(), "unit"], [[t, *tables.bold(cells), u] for t, cells, u in self._rows()]
        )
        lines += [
            f"Corrupted: the mean over all sets (corruption × severity) of each set's own metric. {tables.LEGEND}",
            "",
            "![corruptions](corruptions.png)",
            "",
            "Each box is the spread over corruption types at one severity (quartiles and median; whiskers to the "
            "extremes), not over seeds. Severity 0 is the clean data.",
            "",
        ]
        summary = self.summary
        for part, title in (("severities", "severity"), ("corruptions", "corruption")):
            lines += [f"## By {title}", ""]
            names = list(dict.fromkeys(name for model in self.models for name in summary[model][part]))
            head = [title, *(f"{METRICS[key].title}, {model}" for key in MAIN for model in self.models)]
            rows = []
            for entry in names:
                row = [str(entry)]
                for key in MAIN:
                    values = [summary[model][part].get(entry, {}).get(key) for model in self.models]
                    row += tables.bold(tables.ranked(values, METRICS[key].better))
                rows.append(row)
            lines += _table(head, rows)
        return "\n".join(lines + tables.settings_section(self.settings))


def check_reference(
    reference: Mapping[str, float], corruptions: Sequence[str], severities: Sequence[int] = SEVERITIES
) -> None:
    """Raise `ConfigError` if reference errors (which may be empty) cannot give an mCE."""
    if not reference:
        return
    if missing := [name for name in corruptions if name not in reference]:
        raise ConfigError(f"reference_errors lack {', '.join(missing)}; give the error of every corruption.")
    if wrong := {name: error for name, error in reference.items() if not 0 < error <= 1}:
        raise ConfigError(f"reference_errors must be fractions in (0, 1]; found {wrong}.")
    if set(severities) != set(SEVERITIES):
        raise ConfigError(
            f"the mCE is a mean over the severities 1 to 5; found {list(severities)}. "
            "Evaluate all five, or do not ask for it."
        )


def read_row(stored: dict[str, Any]) -> dict[str, Any]:
    """A row as it was before `finite_or_text`. Raises `KeyError`, `TypeError` or `ValueError` if it is none."""
    names = {"model": str(stored["model"]), "corruption": str(stored["corruption"])}
    counts = {"severity": int(stored["severity"]), "examples": int(stored["examples"])}
    known = {**names, **counts}
    return known | {key: float(value) for key, value in stored.items() if key not in known}


def _means(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Mean of each metric that all rows have."""
    rows = list(rows)
    keys = [key for key in METRICS if rows and all(key in row for row in rows)]
    return {key: sum(row[key] for row in rows) / len(rows) for key in keys}


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return tables.markdown_table(head, "| --- |" + " ---: |" * (len(head) - 1), rows)
