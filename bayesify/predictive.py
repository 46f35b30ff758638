"""The predictive distribution: a mixture over members and samples.

Shapes: K members, S samples per member, B examples, C classes (or outputs). All information is in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayesify.errors import DataError
from bayesify.tasks import TASKS, Gaussian, TaskName, Values, in_pieces, log_mean_exp

if TYPE_CHECKING:
    from bayesify.calibration import Conformal


@dataclass(frozen=True)
class Predictive:
    """What K members with S samples each say about B examples.

    Args:
        outputs: [K, S, B, ..., C] raw network outputs: logits of classes, always last; logits of labels; values; or
            means and log variances, one after the other in the last dimension.
        task: "classification" (also of tokens and pixels), "multilabel", "regression" or "gaussian".
        conformal: what `sets` needs, if the model has been through `fit_sets`.

    | task | what there is |
    | --- | --- |
    | classification | `probs` [B, ..., C]; `entropy`, `mutual_information` [B, ...] |
    | multilabel | `probs`, `entropy`, `mutual_information` [B, L], of each label by itself |
    | regression | `mean`, `variance`, `epistemic_variance` [B, D] |
    | gaussian | the same and `aleatoric_variance` [B, D] |
    """

    outputs: Tensor
    task: TaskName = "classification"
    conformal: Conformal | None = None

    def __post_init__(self) -> None:
        if self.outputs.dim() < 4:
            raise DataError(
                f"Predictive needs outputs shaped [members, samples, examples, ..., classes]; "
                f"found {tuple(self.outputs.shape)}."
            )
        if self.task in ("segmentation", "members"):
            raise DataError(f"Predictive holds no outputs of the task {self.task!r}; `Predictive.of` arranges them.")

    def __len__(self) -> int:
        return self.outputs.shape[2]

    @classmethod
    def of(
        cls, outputs: Tensor, task: TaskName, temperature: float = 1.0, conformal: Conformal | None = None
    ) -> Predictive:
        """Of outputs [K, S, B, ...] as the network gives them, for any of its tasks, divided by the temperature."""
        if outputs.dim() == 3:
            outputs = outputs.unsqueeze(-1)
        arranged = TASKS[task].arranged(outputs.flatten(0, 2)).unflatten(0, outputs.shape[:3])
        if temperature != 1.0:
            arranged = arranged / temperature
        return cls(arranged, "classification" if task == "segmentation" else task, conformal)

    @property
    def has_classes(self) -> bool:
        """Whether it gives probabilities, of classes or labels, and not moments of values."""
        return not isinstance(TASKS[self.task], Values)

    @property
    def binary(self) -> Predictive:
        """Of several labels: each label as a classification of two classes, [K, S, B, L, 2]."""
        self._needs("multilabel")
        return Predictive(torch.stack([torch.zeros_like(self.outputs), self.outputs], -1))

    @property
    def member_log_probs(self) -> Tensor:
        """[K, S, B, C] log-probabilities of each member and sample."""
        return self._log_probs(self.outputs)

    @property
    def member_probs(self) -> Tensor:
        """[K, S, B, C] probabilities of each member and sample."""
        return self.member_log_probs.exp()

    @property
    def log_probs(self) -> Tensor:
        """[B, C] log of the mixture's probabilities, by logsumexp over members and samples."""
        return self._of_places(log_mean_exp)

    @property
    def probs(self) -> Tensor:
        """[B, C] probabilities of the mixture."""
        return self.log_probs.exp()

    @property
    def entropy(self) -> Tensor:
        """[B] total uncertainty H[mean p], in nats; [B, L] for several labels."""
        if self.task == "multilabel":
            return self.binary.entropy
        return self._of_places(_total_entropy)

    @property
    def mutual_information(self) -> Tensor:
        """[B] disagreement H[mean p] − mean H[p] ≥ 0, in nats: what the members do not know together."""
        if self.task == "multilabel":
            return self.binary.mutual_information
        return self._of_places(_mutual_information)

    @property
    def mean(self) -> Tensor:
        """[B, D] mean of the mixture (regression)."""
        return self._moments[0].mean((0, 1))

    @property
    def variance(self) -> Tensor:
        """[B, D] variance of the mixture (regression): the epistemic part and, if the network tells it, the aleatoric.

        Var[y] = Var_ks[mean_ks] + mean_ks[variance_ks]  (law of total variance)
        """
        if self.task == "gaussian":
            return self.epistemic_variance + self.aleatoric_variance
        return self.epistemic_variance

    @property
    def epistemic_variance(self) -> Tensor:
        """[B, D] variance of the means over members and samples: what more data would take away."""
        return self._moments[0].var((0, 1), unbiased=False)

    @property
    def aleatoric_variance(self) -> Tensor:
        """[B, D] mean variance that members and samples tell: the noise of the data (task "gaussian")."""
        self._needs("gaussian")
        return self._moments[1].mean((0, 1))

    def sets(self, alpha: float = 0.1) -> Tensor:
        """[B, C] bool: a set of classes for each example, with the true one in it with probability 1 − alpha or more.

        The probability is over examples drawn like those of `BayesianModel.fit_sets`; it does not hold for one class or
        one kind of example by itself, nor for shifted data. The most probable class is always in the set.

        Raises:
            DataError: the model has not been through `fit_sets`, or was with another number of samples.
        """
        if self.conformal is None or self.task != "classification" or self.outputs.dim() != 4:
            raise DataError(
                "there are sets of classes for a classification [B, C] by a model with calibration data: call "
                "bnn.fit_sets(loader) first, then predict again."
            )
        if self.outputs.shape[1] != (self.conformal.samples or 1):
            raise DataError(
                f"the sets were fitted with samples={self.conformal.samples}, and these are {self.outputs.shape[1]} "
                "samples of each member; predict as fitted, or fit anew with the samples that you predict with."
            )
        return self.conformal.sets(self.probs, alpha)

    def fitted(self, targets: Tensor) -> Predictive:
        """The same at the targets' resolution: logits of pixels are resized bilinearly, as transformers' losses do.

        Raises:
            DataError: targets of another shape or type, or out of range.
        """
        outputs = TASKS[self.task].fitted(self.outputs.flatten(0, 1), targets)
        return replace(self, outputs=outputs.unflatten(0, self.outputs.shape[:2]))

    def log_prob(self, targets: Tensor) -> Tensor:
        """Log-likelihood, in nats, of `targets` under the mixture; 0 for labels of −100, which do not count.

        [B, ...] of integer classes [B, ...]; [B, L] of labels [B, L] in {0, 1}; [B] of values [B, D], under the mixture
        of normals or, for a regression without variances, a normal of variance 1 around the mean.
        """
        return TASKS[self.task].mixture_log_prob(self.fitted(targets).outputs.flatten(0, 1), targets)

    def nll(self, targets: Tensor) -> Tensor:
        """Negative log-likelihood of the mixture, a scalar in nats: the mean over the targets that count.

        NLL = −mean_b log (1/(S K)) Σ_{s,k} p(y_b | x_b, sample s of member k)  (paper-style mixture NLL)
        """
        log_prob = self.log_prob(targets)
        return -log_prob.sum() / TASKS[self.task].count(targets).to(log_prob.device)

    def to(self, device: torch.device | str) -> Predictive:
        return replace(self, outputs=self.outputs.to(device))

    @staticmethod
    def cat(parts: Sequence[Predictive]) -> Predictive:
        """Concatenate along the examples."""
        if not parts:
            raise DataError("there is no prediction to concatenate: the data set is empty.")
        return replace(parts[0], outputs=torch.cat([part.outputs for part in parts], dim=2))

    def _log_probs(self, outputs: Tensor) -> Tensor:
        if self.task == "multilabel":
            return torch.nn.functional.logsigmoid(outputs.float())
        self._needs("classification")
        return outputs.float().log_softmax(-1)

    def _of_places(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """[B, ...] or [B, ..., C] what a function makes of log-probabilities [K·S, ..., C] of some places at a time:
        examples, tokens or pixels."""
        outputs = self.outputs.flatten(0, 1)
        last = outputs.dim() - 2 if outputs.is_contiguous() else 1  # pixels, whose classes lie apart, would be copied
        return in_pieces(lambda piece: function(self._log_probs(piece)), outputs, 1, last)

    @property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [K, S, B, D] of each member and sample."""
        task = TASKS[self.task]
        if isinstance(task, Gaussian):
            return task.moments(self.outputs)
        self._needs("regression")
        return self.outputs.float(), torch.zeros_like(self.outputs)

    def _needs(self, task: TaskName) -> None:
        if self.task != task:
            raise DataError(f"this is a {self.task} predictive; the value asked for exists for {task} only.")


def _entropy(log_probs: Tensor) -> Tensor:
    return torch.special.entr(log_probs.exp()).sum(-1)


def _total_entropy(log_probs: Tensor) -> Tensor:
    return _entropy(log_mean_exp(log_probs))


def _mutual_information(log_probs: Tensor) -> Tensor:
    return (_total_entropy(log_probs) - _entropy(log_probs).mean(0)).clamp_min(0.0)
