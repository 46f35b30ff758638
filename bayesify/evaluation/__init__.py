"""How good are the probabilities? Metrics, pictures and reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bayesify.errors import ConfigError, DataError
from bayesify.evaluation.collect import collect, collect_labeled, with_baseline
from bayesify.evaluation.corrupted import CORRUPTIONS, SEVERITIES, CorruptedImages, CorruptionSet, corruption_sets
from bayesify.evaluation.corruption_report import ALEXNET_ERRORS, CorruptionReport
from bayesify.evaluation.corruptions import evaluate_corruptions
from bayesify.evaluation.metrics import (
    METRICS,
    Metric,
    class_table,
    classification_metrics,
    metrics_from_scores,
    ood_metrics,
    regression_metrics,
)
from bayesify.evaluation.report import Evaluation
from bayesify.evaluation.scores import Scores, score
from bayesify.tasks import TaskName

__all__ = [
    "ALEXNET_ERRORS",
    "CORRUPTIONS",
    "METRICS",
    "SEVERITIES",
    "CorruptedImages",
    "CorruptionReport",
    "CorruptionSet",
    "Evaluation",
    "Metric",
    "Scores",
    "classification_metrics",
    "collect",
    "corruption_sets",
    "evaluate",
    "evaluate_corruptions",
    "ood_metrics",
    "regression_metrics",
    "score",
]


def evaluate(
    model: Any,
    data: Iterable[Any],
    *,
    out_of_distribution: Iterable[Any] | None = None,
    baseline: Any = None,
    samples: int | None = None,
    member_chunk: int | None = None,
    seed: int = 0,
    name: str = "bayesian",
    class_names: Sequence[str] | None = None,
    output: str | Path | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
    task: TaskName | None = None,
) -> Evaluation:
    """Measure a model on labeled data, if wanted beside a baseline and against out-of-distribution data.

    Args:
        model: a Bayesian model or an ordinary network, see `collect`.
        data: labeled batches, see `collect`: a DataLoader or a list of batches.
        out_of_distribution: batches unlike the training data; labels in them are ignored.
        baseline: a network to compare with, usually the one before conversion; listed as "deterministic".
        samples: draws per member; None is the posterior mean.
        member_chunk: members computed at a time; None is as many as are expected to cost least.
        seed: of the draws.
        name: what the report calls the model.
        class_names: C names; adds a table of accuracy by class.
        output: folder for report.json, report.md and pictures.
        progress: show bars with the time left on stderr.
        device: where the inputs go; the default is where each model is.
        task: what the outputs of a plain network mean, if its config and its labels do not tell; a Bayesian model's
            own counts.

    Raises:
        DataError: the data are empty or unlabeled, do not fit the model, or cannot be read again.
        ConfigError: the model and the baseline have the same name; or data out of distribution without classes.
    """
    models = with_baseline(model, name, baseline)
    if baseline is not None:
        for given, batches in (("data", data), ("out_of_distribution", out_of_distribution)):
            if isinstance(batches, Iterator):
                raise DataError(
                    f"{given} is an iterator and can be read once, but the baseline reads it again. "
                    "Give a DataLoader or a list of batches."
                )

    metrics, ood, classes, predictions = {}, {}, [], {}
    outside = None
    options: dict[str, Any] = {"samples": samples, "member_chunk": member_chunk, "seed": seed}
    options |= {"progress": progress, "device": device}
    for title, network in models.items():
        predictive, targets = collect_labeled(network, data, task=task, description=title, **options)
        task = task or getattr(network, "task", None) or predictive.task
        predictions[title] = (predictive, targets)
        if not predictive.has_classes:
            if out_of_distribution is not None:
                raise ConfigError(f"out_of_distribution is for classes; these are outputs of a {predictive.task}.")
            metrics[title] = regression_metrics(predictive, targets)
            continue
        scores = score(predictive, targets)
        metrics[title] = metrics_from_scores(scores)
        if class_names is not None and title == name:
            classes = class_table(scores, class_names)
        if out_of_distribution is not None:
            description = f"{title}, out of distribution"
            far, _ = collect(network, out_of_distribution, labeled=False, description=description, **options)
            ood[title] = ood_metrics(predictive, far)
            outside = outside or far

    members, drawn, examples = predictions[name][0].outputs.shape[:3]
    evaluation = Evaluation(
        metrics=metrics,
        num_examples=examples,
        members=members,
        samples=drawn,
        seed=seed,
        ood=ood,
        classes=classes,
        settings={
            "task": task,
            "samples": "posterior mean" if samples is None else samples,
            "member_chunk": member_chunk,
            "torch": str(torch.__version__),
        },
        predictions=predictions,
        outside=outside,
    )
    if output is not None:
        evaluation.save(output)
    return evaluation
