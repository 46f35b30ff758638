"""The predictive distribution: a mixture over members and samples.

Shapes: K members, S samples per member, B examples, C classes (or outputs). All information is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayesify.errors import DataError

Task = Literal["classification", "regression"]


@dataclass(frozen=True)
class Predictive:
    """What K members with S samples each say about B examples.

    Args:
        outputs: [K, S, B, ..., C] raw network outputs: logits, or values for regression.
        task: how the outputs are read.

    `probs`, `entropy` and `mutual_information` exist for classification, `mean` and `variance` for regression.
    """

    outputs: Tensor
    task: Task = "classification"

    def __post_init__(self) -> None:
        if self.outputs.dim() < 4:
            raise DataError(
                f"Predictive needs outputs shaped [members, samples, examples, ..., classes]; "
                f"found {tuple(self.outputs.shape)}."
            )

    def __len__(self) -> int:
        return self.outputs.shape[2]

    @property
    def member_log_probs(self) -> Tensor:
        """[K, S, B, C] log-probabilities of each member and sample."""
        self._needs("classification")
        return self.outputs.float().log_softmax(-1)

    @property
    def member_probs(self) -> Tensor:
        """[K, S, B, C] probabilities of each member and sample."""
        return self.member_log_probs.exp()

    @property
    def log_probs(self) -> Tensor:
        """[B, C] log of the mixture's probabilities, by logsumexp over members and samples."""
        members, samples = self.outputs.shape[:2]
        return self.member_log_probs.logsumexp((0, 1)) - math.log(members * samples)

    @property
    def probs(self) -> Tensor:
        """[B, C] probabilities of the mixture."""
        return self.log_probs.exp()

    @property
    def entropy(self) -> Tensor:
        """[B] total uncertainty H[mean p], in nats."""
        return _entropy(self.log_probs)

    @property
    def mutual_information(self) -> Tensor:
        """[B] disagreement H[mean p] − mean H[p] ≥ 0, in nats: what the members do not know together."""
        return (self.entropy - _entropy(self.member_log_probs).mean((0, 1))).clamp_min(0.0)

    @property
    def mean(self) -> Tensor:
        """[B, C] mean of the outputs (regression)."""
        self._needs("regression")
        return self.outputs.float().mean((0, 1))

    @property
    def variance(self) -> Tensor:
        """[B, C] variance of the outputs over members and samples (regression): the epistemic part."""
        self._needs("regression")
        return self.outputs.float().var((0, 1), unbiased=False)

    def log_prob(self, targets: Tensor) -> Tensor:
        """[B] log-probability, in nats, that the mixture gives the integer class `targets` [B]."""
        log_probs = self.log_probs
        if targets.shape != log_probs.shape[:-1] or targets.is_floating_point():
            raise DataError(
                f"targets must be integer classes of shape {tuple(log_probs.shape[:-1])}; "
                f"found {targets.dtype} of shape {tuple(targets.shape)}."
            )
        check_labels(targets, log_probs.shape[-1])
        return log_probs.gather(-1, targets.to(log_probs.device).unsqueeze(-1)).squeeze(-1)

    def nll(self, targets: Tensor) -> Tensor:
        """Negative log-likelihood of the mixture, a scalar in nats: the mean of `-log_prob(targets)`.

        NLL = −mean_b log (1/(S K)) Σ_{s,k} p(y_b | x_b, sample s of member k)  (paper-style mixture NLL)
        """
        return -self.log_prob(targets).mean()

    def to(self, device: torch.device | str) -> Predictive:
        return Predictive(self.outputs.to(device), self.task)

    @staticmethod
    def cat(parts: Sequence[Predictive]) -> Predictive:
        """Concatenate along the examples."""
        if not parts:
            raise DataError("there is no prediction to concatenate: the data set is empty.")
        return Predictive(torch.cat([part.outputs for part in parts], dim=2), parts[0].task)

    def _needs(self, task: Task) -> None:
        if self.task != task:
            raise DataError(f"this is a {self.task} predictive; the value asked for exists for {task} only.")


def check_labels(targets: Tensor, num_classes: int) -> None:
    """Raise `DataError` if an integer label lies outside 0 … num_classes − 1."""
    if targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"label {low if low < 0 else high} is out of range: the model has {num_classes} classes "
            f"(0 to {num_classes - 1}). Check the label column, or give the model a head of the right size."
        )


def _entropy(log_probs: Tensor) -> Tensor:
    return torch.special.entr(log_probs.exp()).sum(-1)
