"""Tasks: how the outputs of a network are read, and how likely they make what was observed.

Shapes: M members (or members times samples), B examples, C classes, L labels, D target values. All in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify.errors import DataError

TaskName = Literal["classification", "segmentation", "multilabel", "regression", "gaussian", "members"]
IGNORED = -100
"""A label that does not count, as in torch's cross entropy and in transformers."""
_LOG_VARIANCE = 20.0
"""Bound on the size of log variances, so that no density overflows."""
_PIECE = 1 << 19
"""Elements of logits that go through several passes together: they stay in the cache."""


class Task:
    """Base of the tasks: outputs are values, and their mixture is their mean."""

    def arranged(self, outputs: Tensor) -> Tensor:
        """A network's outputs [B, ...] as `Predictive` holds them: what belongs to one answer is last."""
        return outputs

    def mixture(self, outputs: Tensor) -> Tensor:
        """[M, B, ...] outputs in the network's layout -> [B, ...]: the one output that says what all say together."""
        return outputs.float().mean(0)

    def fitted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Arranged outputs [M, B, ...] at the resolution of the targets [B, ...].

        Raises:
            DataError: targets of another shape or type, or out of range.
        """
        raise NotImplementedError

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[M, B, ...] log-likelihood of each target, from fitted outputs; 0 for targets that do not count."""
        raise NotImplementedError

    def mixture_log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """[B, ...] log-likelihood of each target under the mixture of the M outputs."""
        return log_mean_exp(self.log_prob(outputs, targets))

    def count(self, targets: Tensor) -> Tensor:
        """How many target values count: what a mean log-likelihood is divided by."""
        return (targets != IGNORED).sum().clamp_min(1)


class Classification(Task):
    """Logits with the classes last, [B, C] or [B, T, C] for tokens; integer targets [B] or [B, T].

    Or probabilities [B, C] as targets, as mixup and label smoothing make them: then the log-likelihood is its mean
    under them, Σ t_c log p_c.
    """

    class_dim = -1

    def mixture(self, outputs: Tensor) -> Tensor:
        """The log of the mean probability."""
        last = outputs.dim() - 1
        places = (1, last - 1) if self.class_dim == -1 else (self.class_dim + 1, last)
        return in_pieces(self._mixture, outputs, *places)

    def _mixture(self, outputs: Tensor) -> Tensor:
        return log_mean_exp(outputs.float().log_softmax(self.class_dim))

    def fitted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point() and targets.shape == outputs.shape[1:] and outputs.dim() == 3:
            _check_probabilities(targets)
            return outputs
        outputs = resized(outputs, targets)
        if targets.shape != outputs.shape[1:-1] or targets.is_floating_point():
            raise DataError(
                f"targets must be integer classes of shape {tuple(outputs.shape[1:-1])}; "
                f"found {targets.dtype} of shape {tuple(targets.shape)}."
            )
        check_labels(targets, outputs.shape[-1])
        return outputs

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return (outputs.float().log_softmax(-1) * targets.to(outputs.device)).sum(-1)
        targets = targets.to(outputs.device, torch.int64)
        index = targets.clamp_min(0).expand(outputs.shape[:-1]).unsqueeze(-1)
        chosen = outputs.float().log_softmax(-1).gather(-1, index).squeeze(-1)
        return chosen.masked_fill(targets == IGNORED, 0.0)

    def mixture_log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if targets.is_floating_point():
            return (log_mean_exp(outputs.float().log_softmax(-1)) * targets.to(outputs.device)).sum(-1)
        return super().mixture_log_prob(outputs, targets)

    def count(self, targets: Tensor) -> Tensor:
        return torch.tensor(max(1, len(targets))) if targets.is_floating_point() else super().count(targets)


class Segmentation(Classification):
    """Logits [B, C, H, W] (or of any number of spatial dimensions) of each pixel; integer targets [B, H, W]."""

    class_dim = 2
    """Of [M, B, C, ...]."""

    def arranged(self, outputs: Tensor) -> Tensor:
        return outputs.movedim(1, -1)


class MultiLabel(Task):
    """A logit for each label, [B, L], of being there; targets [B, L] of zeros and ones, or [B] for L = 1."""

    def mixture(self, outputs: Tensor) -> Tensor:
        """The logit of the mean probability: log p − log (1 − p)."""
        outputs = outputs.float()
        return F.logsigmoid(outputs).logsumexp(0) - F.logsigmoid(-outputs).logsumexp(0)

    def fitted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _check_shape(targets, outputs)
        odd = targets[(targets != 0) & (targets != 1) & (targets != IGNORED)]
        if odd.numel():
            raise DataError(f"targets of several labels must be 0 or 1; found {odd.flatten()[0].item():g}.")
        return outputs

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        targets = targets.to(outputs.device).view(outputs.shape[1:])
        there = F.logsigmoid(torch.where(targets == 1, outputs.float(), -outputs.float()))
        return there.masked_fill(targets == IGNORED, 0.0)


class Values(Task):
    """Base of the tasks with real values as targets: all count, and those of an example have one log-likelihood."""

    def count(self, targets: Tensor) -> Tensor:
        return targets.new_tensor(max(1, targets.numel()), dtype=torch.int64)


class Regression(Values):
    """Values [B, D] without a scale: the mean of a normal of variance 1; targets [B, D], or [B] for D = 1."""

    def fitted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _check_shape(targets, outputs)
        return outputs

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean = outputs.float()
        return _normal_log_prob(mean, torch.ones_like(mean), targets)

    def mixture_log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of the mean alone: without a scale of its own, the spread of the members must not count as noise."""
        return self.log_prob(outputs.float().mean(0, keepdim=True), targets).squeeze(0)


class Gaussian(Values):
    """Means and log variances, one after the other in the last dimension, [B, 2D]; targets [B, D], or [B] for D = 1."""

    def mixture(self, outputs: Tensor) -> Tensor:
        """The mean and the log of the variance of the mixture of normals."""
        mean, variance = self.moments(outputs)
        total = variance.mean(0) + mean.var(0, unbiased=False)
        return torch.cat([mean.mean(0), total.log()], -1)

    def moments(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 2D] -> mean and variance, each [..., D]."""
        if outputs.shape[-1] % 2:
            raise DataError(f"a mean and a log variance for each value make an even number; found {outputs.shape[-1]}.")
        mean, log_variance = outputs.float().chunk(2, -1)
        return mean, log_variance.clamp(-_LOG_VARIANCE, _LOG_VARIANCE).exp()

    def fitted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        _check_shape(targets, self.moments(outputs)[0])
        return outputs

    def log_prob(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _normal_log_prob(*self.moments(outputs), targets)


class Members(Task):
    """Outputs that have no mean, as boxes of objects in no order: a call gives the rows of every member."""

    def arranged(self, outputs: Tensor) -> Tensor:
        raise DataError(
            "no mixture of these outputs is defined, so there is no Predictive; a call in eval mode gives the K·B rows "
            "of the members' own outputs. Give task= if the outputs are classes or values after all."
        )

    def fitted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise DataError("these outputs have no likelihood of ours; give the labels to the network, for its own loss.")


TASKS: dict[TaskName, Task] = {
    "classification": Classification(),
    "segmentation": Segmentation(),
    "multilabel": MultiLabel(),
    "regression": Regression(),
    "gaussian": Gaussian(),
    "members": Members(),
}


def resolve_task(output: Tensor, task: TaskName | None) -> TaskName:
    """Without a given task, [B, C] with several columns are logits of classes; anything else is averaged."""
    if task is not None:
        return task
    return "classification" if output.dim() == 2 and output.shape[-1] > 1 else "regression"


def check_guess(task: TaskName | None, guessed: TaskName, targets: Tensor) -> None:
    """Raise `DataError` if classes would be taken for values because nobody gave the task."""
    if task is None and guessed == "regression" and not targets.is_floating_point():
        raise DataError(
            f"the labels are of {targets.dtype}, but outputs of such a shape are read as values. Give the task: "
            "'multilabel' for logits of labels that are 0 or 1, 'classification' for classes last, as of tokens; or "
            "'regression', or labels of real numbers, if they are values."
        )


def predicts_next_token(model: nn.Module) -> bool:
    """Whether a transformers model's outputs at a token are of the next one, and its loss shifts labels itself."""
    model = _without_adapters(model)
    config = getattr(model, "config", None)
    if not isinstance(getattr(model, "main_input_name", None), str) or getattr(config, "is_encoder_decoder", True):
        return False
    names = [cls.__name__ for cls in type(model).__mro__]
    return any(name.endswith(_DECODERS) and not name.startswith(_OF_THE_SAME_TOKEN) for name in names)


def next_tokens(labels: Tensor) -> Tensor:
    """[B, T] labels of each token -> those of the token after it; the last has none."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)


def _without_adapters(model: nn.Module) -> nn.Module:
    """The network inside of a model of peft."""
    inner: Any = getattr(model, "get_base_model", None)
    return inner() if inner is not None and type(model).__module__.startswith("peft.") else model


def task_of(model: nn.Module) -> TaskName | None:
    """What transformers and timm say their model does; `None` for any other model."""
    model = _without_adapters(model)
    config = getattr(model, "config", None)
    if isinstance(getattr(model, "main_input_name", None), str) and config is not None:
        for cls in type(model).__mro__:
            if (task := _transformers_task(cls.__name__, config)) is not None:
                return task
        return "regression"
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        return "classification" if getattr(model, "num_classes", 0) else "regression"
    return None


_CLASSIFIERS = (
    "Classification", "LMHeadModel", "CausalLM", "MaskedLM", "ConditionalGeneration", "MultipleChoice", "CTC",
    "SentencePrediction", "QuestionAnswering", "ForPreTraining", "ImageTextToText", "SpeechSeq2Seq",
)  # fmt: skip
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OF_THE_SAME_TOKEN = ("XLNet", "XLM", "Flaubert")
_SETS = ("ObjectDetection", "InstanceSegmentation", "UniversalSegmentation")


def _transformers_task(name: str, config: object) -> TaskName | None:
    problem = getattr(config, "problem_type", None)
    if problem == "regression":
        return "regression"
    if problem == "multi_label_classification":
        return "multilabel"
    single = name.endswith(("SequenceClassification", "ImageClassification"))
    if single and getattr(config, "num_labels", 2) == 1:
        return "regression"
    if name.endswith("SemanticSegmentation"):
        return "segmentation"
    if name.endswith(_SETS):
        return "members"
    return "classification" if name.endswith(_CLASSIFIERS) else None


def _is_large(outputs: Tensor) -> bool:
    """Whether each of several passes would take them from memory, as the logits of all tokens are."""
    return outputs.device.type == "cpu" and not torch.compiler.is_compiling() and outputs.numel() > 2 * _PIECE


def in_pieces(function: Callable[[Tensor], Tensor], outputs: Tensor, first: int, last: int) -> Tensor:
    """What a function of outputs [M, ...] gives, a few places at a time: it takes each of those in the dimensions from
    `first` to `last` by itself, and the M outputs together."""
    if last < first or not _is_large(outputs):
        return function(outputs)
    places = outputs.flatten(first, last)
    each = max(1, _PIECE * places.shape[first] // places.numel())
    found = torch.cat([function(piece) for piece in places.split(each, first)], first - 1)
    return found.unflatten(first - 1, outputs.shape[first : last + 1])


def log_mean_exp(log_probs: Tensor) -> Tensor:
    """The log of the mean over the first dimension of what the values are the logs of."""
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def check_labels(targets: Tensor, num_classes: int) -> None:
    """Raise `DataError` if an integer label that counts lies outside 0 … num_classes − 1."""
    targets = targets[targets != IGNORED]
    if targets.numel() == 0:
        return
    low, high = int(targets.min()), int(targets.max())
    if num_classes == 1:
        raise DataError(
            "the model has one output, which is no choice of a class. Give task='multilabel' if it is the logit of a "
            "label that is 0 or 1, or task='regression' if it is a value."
        )
    if low < 0 or high >= num_classes:
        raise DataError(
            f"label {low if low < 0 else high} is out of range: the model has {num_classes} classes "
            f"(0 to {num_classes - 1}). Check the label column, or give the model a head of the right size."
        )


def _check_probabilities(targets: Tensor) -> None:
    if bool((targets < 0).any()) or bool(((targets.float().sum(-1) - 1).abs() > 0.01).any()):
        raise DataError(
            "real targets of the shape of the logits are probabilities of the classes: not negative, and 1 in sum. "
            "Give integer classes, or task='regression' for values and 'multilabel' for labels that are 0 or 1."
        )


def resized(outputs: Tensor, targets: Tensor) -> Tensor:
    """Logits [M, B, h, w, C] of pixels at the size of the labels [B, H, W], bilinearly, as transformers' losses do."""
    size = targets.shape[1:]
    if targets.dim() != 3 or outputs.dim() != 5 or outputs.shape[2:4] == size:
        return outputs
    images = outputs.flatten(0, 1).movedim(-1, 1)
    larger = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)
    return larger.movedim(1, -1).unflatten(0, outputs.shape[:2])


def _check_shape(targets: Tensor, outputs: Tensor) -> None:
    """Targets [B, D], or [B] where D = 1, for outputs [M, B, D]."""
    wanted, found = tuple(outputs.shape[1:]), tuple(targets.shape)
    if found not in (wanted, (*wanted, 1)) and (*found, 1) != wanted:
        raise DataError(f"targets must have shape {wanted}; found {found}.")


def _normal_log_prob(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """[M, B] log density of the targets, summed over the values of an example, for moments [M, B, ...]."""
    error = (mean - targets.to(mean.device).view(mean.shape[1:]).float()).square()
    log_prob = -0.5 * (error / variance + variance.log() + math.log(2 * math.pi))
    return log_prob.flatten(2).sum(-1) if log_prob.dim() > 2 else log_prob
