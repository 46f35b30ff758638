"""Metrics of a predictive: accuracy, calibration, ranking by doubt, disagreement of the members.

torchmetrics computes what it knows. It is imported inside the functions, as it takes seconds and pulls in
pyplot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bayesify.errors import DataError
from bayesify.evaluation.scores import Scores, doubts, score
from bayesify.predictive import Predictive

BINS = 15
NORMAL_90 = 1.6448536269514722
"""Half the width of the central 90 % of a normal, in standard deviations."""


class Metric(NamedTuple):
    """How to read one number: title, unit, better direction ("up", "down" or "" for neither), meaning."""

    title: str
    unit: str
    better: str
    meaning: str


METRICS: dict[str, Metric] = {
    "accuracy": Metric("Accuracy", "fraction", "up", "share of examples whose most probable class is right"),
    "nll": Metric("NLL", "nats", "down", "mean −log of the probability the mixture gave to the true class"),
    "ece": Metric("ECE", "fraction", "down", f"mean |accuracy − confidence| over {BINS} equal-width bins"),
    "brier": Metric("Brier", "0 to 2", "down", "mean squared distance of the probabilities to the one-hot truth"),
    "aurc": Metric("AURC", "fraction", "down", "error rate among the most confident, averaged over all coverages"),
    "auc_pr": Metric("AUC-PR", "fraction", "up", "average precision of finding class 1 by its probability"),
    "disagreement": Metric("Disagreement", "fraction", "", "share of examples on which two members differ in class"),
    "member_nll": Metric("Member NLL", "nats", "down", "NLL of a single member, averaged over members"),
    "member_accuracy": Metric(
        "Member accuracy", "fraction", "up", "accuracy of a single member, averaged over members"
    ),
    "entropy": Metric("Entropy", "nats", "", "mean total uncertainty, H[mean p]"),
    "mutual_information": Metric(
        "Mutual information", "nats", "", "mean part of the entropy due to members and samples disagreeing"
    ),
    "rmse": Metric("RMSE", "units of the target", "down", "root of the mean squared error of the predictive mean"),
    "epistemic_variance": Metric(
        "Epistemic variance", "target units²", "", "mean variance of the outputs over members and samples"
    ),
    "aleatoric_variance": Metric(
        "Aleatoric variance", "target units²", "", "mean variance that the network itself tells: the noise of the data"
    ),
    "coverage": Metric(
        "Coverage of 90 %",
        "fraction",
        "",
        "share of targets in the central 90 % of a normal with the predictive's moments",
    ),
    "auroc_entropy": Metric(
        "AUROC, entropy",
        "fraction",
        "up",
        "chance that an outside example has the higher entropy (0.5: blind)",
    ),
    "auroc_mutual_information": Metric(
        "AUROC, mutual information", "fraction", "up", "the same for mutual information (0.5: blind)"
    ),
}


def classification_metrics(predictive: Predictive, targets: Tensor) -> dict[str, float]:
    """Metrics of a classification predictive [K, S, B, C] against the true classes `targets` [B].

    Keys, in order (`METRICS` says what each means):
        accuracy, nll [nats], ece, brier = mean_b Σ_c (p_bc − y_bc)², aurc, disagreement (0 for K = 1),
        member_nll [nats], member_accuracy, entropy [nats], mutual_information [nats];
        for two classes that both occur also auc_pr, after aurc.

    Raises:
        DataError: see `score`.
    """
    return metrics_from_scores(score(predictive, targets))


def metrics_from_scores(scores: Scores) -> dict[str, float]:
    """`classification_metrics` of columns already at hand."""
    from torchmetrics.functional.classification import multiclass_accuracy

    accuracy = multiclass_accuracy(scores.predicted, scores.targets, scores.num_classes, average="micro")
    return {
        "accuracy": float(accuracy),
        "nll": -float(scores.log_prob.mean()),
        "ece": calibration_error(scores),
        "brier": float(scores.squared_error.mean()),
        "aurc": float(risk_coverage_curve(scores).mean()),
        **_auc_pr(scores),
        "disagreement": disagreement(scores.member_predicted),
        "member_nll": -float(scores.member_log_prob.mean()),
        "member_accuracy": float((scores.member_predicted == scores.targets).double().mean()),
        "entropy": float(scores.entropy.mean()),
        "mutual_information": float(scores.mutual_information.mean()),
    }


def regression_metrics(predictive: Predictive, targets: Tensor) -> dict[str, float]:
    """Metrics of a regression predictive [K, S, B, D] (task "regression" or "gaussian") against `targets` [B, D].

    Targets may be [B] if D = 1. Keys (`METRICS` says what each means): rmse, epistemic_variance; where the network
    tells a variance also nll [nats, of each value], aleatoric_variance and coverage.

    Raises:
        DataError: not a regression, nothing to score, targets of the wrong shape, or NaN in either.
    """
    from torchmetrics.functional.regression import mean_squared_error

    mean = predictive.mean
    if mean.numel() == 0:
        raise DataError("there are no examples to score: the data set is empty.")
    predictive.fitted(targets)  # checks the shape
    targets = targets.to(mean.device, torch.float32).view_as(mean)
    if mean.isnan().any() or targets.isnan().any():
        raise DataError("the outputs or the targets hold NaN. Drop rows without a target and check the inputs.")
    rmse = mean_squared_error(mean.flatten(), targets.flatten(), squared=False)
    metrics = {"rmse": float(rmse), "epistemic_variance": float(predictive.epistemic_variance.mean())}
    if predictive.task == "gaussian":
        inside = (targets - mean).abs() <= NORMAL_90 * predictive.variance.sqrt()
        metrics["nll"] = float(predictive.nll(targets))
        metrics["aleatoric_variance"] = float(predictive.aleatoric_variance.mean())
        metrics["coverage"] = float(inside.double().mean())
    return metrics


def ood_metrics(inside: Predictive, outside: Predictive) -> dict[str, float]:
    """{"auroc_entropy", "auroc_mutual_information"}: how well doubt tells `outside` (positive) from `inside`.

    AUROC = P(doubt of an outside example > doubt of an inside one) + ½ P(equal); a constant doubt gives 0.5.

    Raises:
        DataError: either side is empty, not a classification, or holds NaN.
    """
    from torchmetrics.functional.classification import binary_auroc

    if len(inside) == 0 or len(outside) == 0:
        raise DataError(f"AUROC needs examples on both sides; found {len(inside)} inside, {len(outside)} outside.")
    result = {}
    within, beyond = doubts(inside), doubts(outside)
    for name, low in within.items():
        doubt = torch.cat([low, beyond[name]])
        label = torch.arange(len(doubt)).ge(len(low)).long()
        if doubt.isnan().any():
            raise DataError(f"the {name.replace('_', ' ')} is NaN for {int(doubt.isnan().sum())} examples.")
        result[f"auroc_{name}"] = float(binary_auroc(_ranks(doubt), label))
    return result


def _auc_pr(scores: Scores) -> dict[str, float]:
    """{"auc_pr"} of two classes; nothing where one of them is absent, as precision and recall need both."""
    from torchmetrics.functional.classification import binary_average_precision

    if scores.log_odds is None or len(scores.targets.unique()) < 2:
        return {}
    precision = binary_average_precision(_ranks(scores.log_odds), scores.targets)
    return {"auc_pr": float(precision)}  # type: ignore[reportArgumentType]


def _ranks(values: Tensor) -> Tensor:
    """Ranks in [0, 1], ties equal: torchmetrics puts scores above 1 through a sigmoid, which makes close ones equal."""
    rank = values.unique(return_inverse=True)[1].double()
    return rank / rank.max().clamp_min(1)


def calibration_error(scores: Scores) -> float:
    """ECE = Σ_bins (n_bin / B) |accuracy − mean confidence|, top label, 15 equal-width bins."""
    from torchmetrics.functional.classification import binary_calibration_error

    # "Is the top label right" is the binary event that the top-label confidence is a forecast of.
    return float(binary_calibration_error(scores.confidence, scores.correct.long(), n_bins=BINS, norm="l1"))


def calibration_bins(scores: Scores, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor]:
    """Count, accuracy, mean confidence, each [bins], in equal-width bins of confidence; NaN where empty."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    index = torch.bucketize(scores.confidence, edges, right=True) - 1
    count = index.bincount(minlength=bins).double()
    accuracy = index.bincount(scores.correct.double(), minlength=bins) / count
    confidence = index.bincount(scores.confidence, minlength=bins) / count
    return count, accuracy, confidence


def risk_coverage_curve(scores: Scores) -> Tensor:
    """[B] error rate among the n most confident examples, for n = 1 … B; AURC is its mean.

    Examples of equal confidence share their mean error, the expectation over a random order among them, so
    the curve does not depend on the order of the data.
    """
    _, group = scores.confidence.unique(return_inverse=True)
    error = (~scores.correct).double()
    shared = (group.bincount(error) / group.bincount())[group]
    ordered = shared[scores.confidence.argsort(descending=True)]
    return ordered.cumsum(0) / torch.arange(1, len(ordered) + 1)


def disagreement(member_predicted: Tensor) -> float:
    """Share of examples on which two members' classes [K, B] differ, averaged over pairs; 0 for K = 1."""
    members = len(member_predicted)
    if members == 1:
        return 0.0
    differ = (member_predicted[:, None] != member_predicted[None]).double().mean(-1)
    return float(differ.sum() / (members * (members - 1)))


def class_table(scores: Scores, class_names: Sequence[str]) -> list[dict[str, str | int | float]]:
    """One row {"class", "examples", "accuracy"} for each class that occurs, the hardest first.

    Raises:
        DataError: not one name for each class.
    """
    if len(class_names) != scores.num_classes:
        raise DataError(f"found {len(class_names)} class names for a model with {scores.num_classes} classes.")
    count = scores.targets.bincount(minlength=scores.num_classes)
    hits = scores.targets[scores.correct].bincount(minlength=scores.num_classes)
    rows: list[dict[str, str | int | float]] = [
        {"class": name, "examples": int(n), "accuracy": int(hit) / int(n)}
        for name, n, hit in zip(class_names, count, hits, strict=True)
        if n > 0
    ]
    return sorted(rows, key=lambda row: row["accuracy"])
