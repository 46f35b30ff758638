"""What a predictive says about each single example: every metric and picture is made from these columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bayesify.errors import DataError
from bayesify.predictive import Predictive
from bayesify.tasks import IGNORED

CHUNK_ELEMENTS = 2**24  # outputs turned into probabilities at a time: bounds memory at ImageNet size


@dataclass(frozen=True)
class Scores:
    """One column per example: [B], float64 on the CPU unless said otherwise.

    Attributes:
        predicted: [B] int64, the most probable class of the mixture.
        targets: [B] int64, the true class.
        confidence: the mixture's probability of `predicted`, in (0, 1).
        log_prob: log-probability of the true class, in nats.
        squared_error: Σ_c (p_c − [c = target])², in [0, 2].
        entropy: H[mean p], in nats.
        mutual_information: H[mean p] − mean H[p], in nats.
        member_predicted: [K, B] int64, each member's most probable class after averaging over its samples.
        member_log_prob: [K, B] each member's log-probability of the true class, in nats, averaged likewise.
        num_classes: C.
        log_odds: log-odds of class 1 against class 0, in nats; None unless C = 2.
    """

    predicted: Tensor
    targets: Tensor
    confidence: Tensor
    log_prob: Tensor
    squared_error: Tensor
    entropy: Tensor
    mutual_information: Tensor
    member_predicted: Tensor
    member_log_prob: Tensor
    num_classes: int
    log_odds: Tensor | None = None

    @property
    def correct(self) -> Tensor:
        """[B] bool: the mixture's most probable class is the true one."""
        return self.predicted == self.targets


def score(predictive: Predictive, targets: Tensor) -> Scores:
    """The columns above for a classification predictive [K, S, B, ..., C] and integer `targets` [B, ...].

    Raises:
        DataError: no examples, fewer than two classes, NaN outputs, or labels of wrong shape, type or range.
    """
    predictive, targets = answers(predictive, targets)
    if len(predictive) == 0:
        raise DataError("there are no examples to score: the data set is empty.")
    outputs = predictive.outputs
    if outputs.shape[-1] < 2:
        raise DataError(
            "classification metrics need at least two classes; found one output per example. "
            "Read the logit of a label that is 0 or 1 as task='multilabel', a value as task='regression'."
        )
    targets = targets.to(outputs.device, torch.int64)
    parts = [_columns(Predictive(o), t) for o, t in zip(_chunks(outputs), targets.split(_rows(outputs)), strict=True)]
    columns = {name: torch.cat([part[name] for part in parts], dim=-1).cpu() for name in parts[0]}
    columns = {name: c.double() if c.is_floating_point() else c for name, c in columns.items()}
    bad = int(columns["entropy"].isnan().sum())
    if bad:
        raise DataError(
            f"the model's outputs hold NaN or +inf for {bad} of {len(targets)} examples. "
            "Look at the inputs and the precision (try float32)."
        )
    # A probability rounded to 1 (or above) would fall out of the last calibration bin [14/15, 1).
    columns["confidence"] = columns["confidence"].clamp(max=1.0 - 2.0**-24)
    return Scores(**columns, num_classes=outputs.shape[-1])


def answers(predictive: Predictive, targets: Tensor) -> tuple[Predictive, Tensor]:
    """Each answer as an example: a classification predictive [K, S, N, C] and its targets [N].

    Tokens and pixels become examples, and so does each label of a multi-label predictive, as a question with two
    answers. Targets of −100 are left out.
    """
    if predictive.task == "multilabel":
        predictive = predictive.fitted(targets)
        predictive, targets = predictive.binary, targets.long().view(predictive.outputs.shape[2:])
    if predictive.task != "classification":
        raise DataError(f"classification metrics need a classification predictive; found {predictive.task}.")
    outputs, targets = predictive.fitted(targets).outputs.flatten(2, -2), targets.flatten()
    counted = targets != IGNORED
    if not counted.all():
        outputs, targets = outputs[:, :, counted], targets[counted]
    return Predictive(outputs), targets


def doubts(predictive: Predictive) -> dict[str, Tensor]:
    """{"entropy": [B], "mutual_information": [B]} in nats, float64 on the CPU, without needing labels."""
    if predictive.task == "multilabel":
        predictive = predictive.binary
    parts = [Predictive(chunk, predictive.task) for chunk in _chunks(predictive.outputs.flatten(2, -2))]
    return {
        "entropy": torch.cat([part.entropy for part in parts]).cpu().double(),
        "mutual_information": torch.cat([part.mutual_information for part in parts]).cpu().double(),
    }


def _rows(outputs: Tensor) -> int:
    members, samples, _, classes = outputs.shape
    return max(1, CHUNK_ELEMENTS // (members * samples * classes))


def _chunks(outputs: Tensor) -> tuple[Tensor, ...]:
    return outputs.split(_rows(outputs), dim=2)


def _columns(predictive: Predictive, targets: Tensor) -> dict[str, Tensor]:
    log_probs = predictive.log_probs
    confidence, predicted = log_probs.max(-1)
    probs = log_probs.exp()
    log_prob = log_probs.gather(-1, targets[:, None]).squeeze(-1)
    members = torch.stack([Predictive(one[None]).log_probs for one in predictive.outputs])
    columns = {
        "predicted": predicted,
        "targets": targets,
        "confidence": confidence.exp(),
        "log_prob": log_prob,
        "squared_error": (probs.square().sum(-1) - 2 * log_prob.exp() + 1).clamp_min(0),
        "entropy": predictive.entropy,
        "mutual_information": predictive.mutual_information,
        "member_predicted": members.argmax(-1),
        "member_log_prob": members.gather(-1, targets.expand(len(members), -1)[..., None]).squeeze(-1),
    }
    if log_probs.shape[-1] == 2:
        columns["log_odds"] = log_probs[:, 1] - log_probs[:, 0]
    return columns
