"""Pictures of calibration and doubt, written as PNG.

Importing this module imports matplotlib, but not pyplot: no backend is chosen, no global figure is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from bayesify.errors import DataError
from bayesify.evaluation.metrics import BINS, calibration_bins, calibration_error, risk_coverage_curve
from bayesify.evaluation.scores import Scores, doubts, score
from bayesify.files import replacing
from bayesify.predictive import Predictive

BLUE, ORANGE, RED, GREEN = "#3b6fb6", "#e08a1e", "#c8423b", "#3f8f5b"
LINES = [BLUE, ORANGE, GREEN, "#8b5fb0", RED, "#8a8f98"]
Predictions = Mapping[str, tuple[Predictive, Tensor]]


def reliability_diagram(predictions: Predictions, path: str | Path) -> None:
    """Accuracy against confidence in 15 bins, one column per model {name: (predictive, targets)}.

    Above: the accuracy of each bin as a bar, its gap to the mean confidence hatched, perfect calibration as
    the diagonal; bins with under 0.5 % of the examples are faint, they hardly move the ECE. Below: the share
    of examples in each bin.
    """
    scores = _scores(predictions)
    figure = Figure(figsize=(max(5.0, 0.6 + 3.7 * len(scores)), 5.6), layout="constrained")
    axes = figure.subplots(2, len(scores), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    for column, (name, one) in enumerate(scores.items()):
        _reliability(axes[0, column], axes[1, column], one)
        axes[0, column].set_title(f"{name}\nECE {calibration_error(one):.2%}", fontsize=11, parse_math=False)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("examples")
    handles = [
        Patch(color=BLUE, label="accuracy"),
        Patch(**_box(RED), label="gap: too confident"),
        Patch(**_box(GREEN), label="gap: not confident enough"),
        Line2D([], [], color="black", linestyle="--", linewidth=1, label="perfect"),
        Line2D([], [], color=RED, label="mean confidence"),
        Line2D([], [], color=BLUE, linestyle="--", label="mean accuracy"),
    ]
    columns = 3 if len(scores) > 1 else 2
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    _save(figure, path)


def _reliability(upper: Axes, lower: Axes, scores: Scores) -> None:
    counts, accuracies, confidences = (values.tolist() for values in calibration_bins(scores))
    width, total = 1 / BINS, sum(counts)
    for index, (count, accuracy, confidence) in enumerate(zip(counts, accuracies, confidences, strict=True)):
        if count == 0:
            continue
        center = (index + 0.5) * width
        alpha = 1.0 if count >= 0.005 * total else 0.3
        upper.bar(center, accuracy, width, color=BLUE, edgecolor="white", linewidth=0.8, alpha=alpha)
        gap = _box(RED if confidence > accuracy else GREEN)
        upper.bar(center, confidence - accuracy, width, bottom=accuracy, linewidth=0.8, alpha=alpha, **gap)
        lower.bar(center, count / total, width, color="#b9c3d0", edgecolor="white")
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    upper.set(xlim=(0, 1), ylim=(0, 1))
    lower.axvline(float(scores.confidence.mean()), color=RED, linewidth=1.5)
    lower.axvline(float(scores.correct.double().mean()), color=BLUE, linestyle="--", linewidth=1.5)
    lower.set_xlabel("confidence")
    lower.yaxis.set_major_formatter(PercentFormatter(1))
    for axis in (upper, lower):
        _tidy(axis)


def uncertainty_histogram(inside: Predictive, outside: Predictive | None, path: str | Path, correct: Tensor) -> None:
    """Histograms of entropy and mutual information, in nats: right, wrong and out-of-distribution examples.

    Args:
        inside: predictive [K, S, B, C] of the data.
        outside: predictive of out-of-distribution data, or None.
        path: the PNG to write.
        correct: [B] bool, which examples the mixture classifies rightly.

    Raises:
        DataError: `correct` does not fit `inside`.
    """
    within = doubts(inside)
    beyond = doubts(outside) if outside is not None else None
    right = correct.cpu().bool().flatten()
    if len(right) != len(within["entropy"]):
        raise DataError(
            f"correct must have one entry for each of {len(within['entropy'])} examples; found {len(right)}."
        )
    single = inside.outputs.shape[0] * inside.outputs.shape[1] == 1
    names = ["entropy"] if single else ["entropy", "mutual_information"]
    figure = Figure(figsize=(0.6 + 4.4 * len(names), 4.0), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        groups = {"right": (within[name][right], BLUE), "wrong": (within[name][~right], RED)}
        if beyond is not None:
            groups["out of distribution"] = (beyond[name], ORANGE)
        _histogram(axis, {label: group for label, group in groups.items() if len(group[0]) > 0})
        axis.set_xlabel(f"{name.replace('_', ' ')} [nats]")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=9, frameon=False)
    axes[0].set_ylabel("share of the group")
    _save(figure, path)


def _histogram(axis: Axes, groups: dict[str, tuple[Tensor, str]]) -> None:
    top = max(float(values.max()) for values, _ in groups.values())
    edges = np.linspace(0, max(top, 1e-6), 31)
    for label, (values, color) in groups.items():
        share = np.histogram(values.numpy().clip(0, edges[-1]), edges)[0] / len(values)
        axis.stairs(share, edges, fill=True, color=color, alpha=0.22)
        axis.stairs(share, edges, color=color, linewidth=1.6, label=f"{label} (mean {float(values.mean()):.3g})")
    axis.set_xlim(0, edges[-1])
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    _tidy(axis)


def risk_coverage(predictions: Predictions, path: str | Path) -> None:
    """Error rate among the most confident examples against the share kept, one line and AURC a model."""
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axis = figure.subplots()
    for index, (name, one) in enumerate(_scores(predictions).items()):
        risk = risk_coverage_curve(one).numpy()
        coverage = np.arange(1, len(risk) + 1) / len(risk)
        label = f"{name} (AURC {risk.mean():.4f})"
        axis.plot(coverage, risk, color=LINES[index % len(LINES)], linewidth=1.8, label=label)
    axis.set(xlim=(0, 1), xlabel="coverage: share of examples answered", ylabel="risk: error rate among them")
    axis.set_ylim(bottom=0)
    for formatter in (axis.xaxis, axis.yaxis):
        formatter.set_major_formatter(PercentFormatter(1))
    axis.legend(loc="upper left", fontsize=9, frameon=False)
    _tidy(axis)
    _save(figure, path)


def corruption_boxes(sets: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """NLL, accuracy and ECE against the severity of corruption, one box a model side by side.

    A box is the spread over corruption types (median, quartiles, extremes), not over seeds; severity 0 is clean.

    Args:
        sets: rows of a `CorruptionReport`.
        path: the PNG to write.
    """
    models = list(dict.fromkeys(row["model"] for row in sets))
    severities = sorted({row["severity"] for row in sets})
    figure = Figure(figsize=(max(5.0, 1.2 + (0.5 + 0.3 * len(models)) * len(severities)), 7.2), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    width = 0.8 / len(models)
    for axis, (key, label) in zip(
        axes, {"nll": "NLL [nats]", "accuracy": "accuracy", "ece": "ECE"}.items(), strict=True
    ):
        for index, model in enumerate(models):
            color = LINES[index % len(LINES)]
            for severity in severities:
                values = [r[key] for r in sets if (r["model"], r["severity"]) == (model, severity)]
                axis.boxplot(
                    [value for value in values if np.isfinite(value)],
                    positions=[severity + (index - (len(models) - 1) / 2) * width],
                    widths=0.85 * width,
                    whis=(0, 100),
                    patch_artist=True,
                    manage_ticks=False,
                    boxprops={"facecolor": color, "edgecolor": color, "alpha": 0.45},
                    medianprops={"color": color, "linewidth": 2},
                    whiskerprops={"color": color},
                    capprops={"color": color},
                )
        axis.set_ylabel(label)
        _tidy(axis)
    for axis in axes[1:]:
        axis.yaxis.set_major_formatter(PercentFormatter(1))
    axes[2].set_xticks(severities, ["clean" if severity == 0 else str(severity) for severity in severities])
    axes[2].set_xlabel("severity (a box is the spread over corruption types, not seeds)")
    handles = [Patch(color=LINES[i % len(LINES)], alpha=0.6, label=model) for i, model in enumerate(models)]
    axes[0].legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(models), fontsize=9, frameon=False
    )
    _save(figure, path)


def _scores(predictions: Predictions) -> dict[str, Scores]:
    if not predictions:
        raise DataError("there is no prediction to draw; give {name: (predictive, targets)}.")
    return {name: score(predictive, targets) for name, (predictive, targets) in predictions.items()}


def _box(color: str) -> dict[str, Any]:
    pale = {RED: "#f8dfdd", GREEN: "#dcefe1"}[color]
    return {"facecolor": pale, "edgecolor": color, "hatch": "////"}


def _tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e3e6ea", linewidth=0.7)
    axis.set_axisbelow(True)


def _save(figure: Figure, path: str | Path) -> None:
    for axis in figure.axes:
        legend = axis.get_legend()
        for text in legend.get_texts() if legend else ():
            text.set_parse_math(False)  # a model may be called anything, "$" included
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
