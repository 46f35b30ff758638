"""Run a model over batches and keep what it predicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from bayesify.batch import split_batch
from bayesify.errors import ConfigError, DataError
from bayesify.fused import FusedModel
from bayesify.model import BayesianModel
from bayesify.modes import evaluating
from bayesify.predictive import Predictive
from bayesify.progress import progress_bar
from bayesify.tasks import IGNORED, TaskName, next_tokens, predicts_next_token, task_of

BASELINE = "deterministic"
"""What reports call the baseline."""


def collect(
    model: Any,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    member_chunk: int | None = None,
    seed: int = 0,
    progress: bool = True,
    device: torch.device | str | None = None,
    task: TaskName | None = None,
    labeled: bool = True,
    description: str = "predicting",
) -> tuple[Predictive, Tensor | None]:
    """The predictive [K, S, B, C] of all batches and their labels [B] (None if there are none), on the CPU.

    Args:
        model: a Bayesian model, fused or not (it has `predict` and `members`), or any network that returns logits
            [B, C], alone or as `.logits`, which counts as K = S = 1. Run in eval mode, every mode restored after.
        batches: mappings of keyword inputs, labels under "labels"; or tuples (inputs ..., labels); or inputs
            alone, as a tensor, (inputs,) or (inputs ..., None). Labels are not shown to the model. Those of a mapping
            for a causal language model are of each token itself, as transformers has them, and shifted here; those
            of question answering may be its "start_positions" and "end_positions".
        samples: draws per member; None is the posterior mean.
        member_chunk: members computed at a time; None is as many as are expected to cost least.
        seed: batch i is predicted with seed + i, so the same batches give the same numbers.
        progress: show a bar with the time left on stderr.
        device: where the inputs go; the default is where the model is.
        task: how an ordinary network's outputs are read; None: as a regression if the labels are real-valued.
        labeled: False drops labels unread, for data whose classes are not the model's.
        description: the text beside the bar.

    Raises:
        DataError: no examples, an unreadable batch or output, labels out of range or in some batches only.
        ConfigError: `samples` or `member_chunk` for a fused model.
    """
    where = torch.device(device) if device is not None else _device(model)
    fused = isinstance(model, FusedModel)
    if fused and (samples is not None or member_chunk is not None):
        raise ConfigError("a fused model has its draws folded in: choose them by fuse(samples=...), not here.")
    if isinstance(batches, Dataset):
        raise DataError(f"expected batches, such as a DataLoader; found {type(batches).__name__}, a data set.")
    shifts = _predicts_next_token(model)
    predictions: list[Predictive] = []
    labels: list[Tensor | None] = []
    with evaluating(model), torch.no_grad():
        for index, batch in enumerate(_tracked(batches, description, progress)):
            args, kwargs, target = split_batch(batch)
            if target is None and kwargs.keys() >= {"start_positions", "end_positions"}:
                target = torch.stack([kwargs.pop("start_positions"), kwargs.pop("end_positions")], 1)
            if not labeled:
                target = None
            if shifts and isinstance(batch, Mapping) and target is not None and target.dim() == 2:
                target = next_tokens(target)
            args, kwargs = _to(args, where), _to(kwargs, where)
            if hasattr(model, "predict") and hasattr(model, "members"):
                drawn = {"samples": samples, "member_chunk": member_chunk, "seed": seed + index}
                prediction = model.predict(*args, **kwargs, **({} if fused else drawn))
            else:
                real = target is not None and target.is_floating_point()
                read_as = task or _special_task(model) or ("regression" if real else "classification")
                prediction = _plain(model(*args, **kwargs), read_as)
            prediction = prediction.to("cpu")
            if target is not None:
                target = target.cpu()
                prediction = _fitted(prediction, target, index)
            if predictions:
                _check_alike(predictions[0], prediction, target, index)
            predictions.append(prediction)
            labels.append(target)

    known = [label for label in labels if label is not None]
    if known and len(known) < len(labels):
        raise DataError(f"only {len(known)} of {len(labels)} batches have labels; label all of them or none.")
    if predictions and _are_tokens(predictions[0]):
        predictions, known = _equally_long(predictions, known)
    predictive = Predictive.cat(predictions)
    if len(predictive) == 0:
        raise DataError("there is no example in the data: every batch is empty.")
    return predictive, torch.cat(known) if known else None


def _check_alike(first: Predictive, prediction: Predictive, target: Tensor | None, index: int) -> None:
    """Raise `DataError` unless outputs fit those of the first batch: of tokens with labels, the length may differ."""
    expected, found = first.outputs.shape[3:], prediction.outputs.shape[3:]
    if expected == found:
        return
    tokens = _are_tokens(first) and _are_tokens(prediction) and expected[-1] == found[-1]
    if not tokens or target is None:
        raise DataError(
            f"batch {index} has outputs of shape {tuple(found)} for an example, and the first {tuple(expected)}. Give "
            + ("labels, or texts padded to one length." if tokens else "inputs of one size.")
        )


def _are_tokens(prediction: Predictive) -> bool:
    """Whether outputs are [K, S, B, T, C] logits of tokens."""
    return prediction.task == "classification" and prediction.outputs.dim() == 5


def _equally_long(predictions: list[Predictive], labels: list[Tensor]) -> tuple[list[Predictive], list[Tensor]]:
    """Outputs of tokens and their labels [B, T], padded to the longest by what does not count."""
    longest = max(prediction.outputs.shape[3] for prediction in predictions)
    missing = [longest - prediction.outputs.shape[3] for prediction in predictions]
    if not any(missing):
        return predictions, labels  # padding by nothing would copy them
    outputs = [F.pad(p.outputs, (0, 0, 0, more)) for p, more in zip(predictions, missing, strict=True)]
    padded = [F.pad(label, (0, more), value=IGNORED) for label, more in zip(labels, missing, strict=False)]
    return [replace(p, outputs=o) for p, o in zip(predictions, outputs, strict=True)], padded


def collect_labeled(model: Any, batches: Iterable[Any], **options: Any) -> tuple[Predictive, Tensor]:
    """`collect`, but data without labels are a `DataError`."""
    predictive, targets = collect(model, batches, **options)
    if targets is None:
        raise DataError("the data have no labels to compare with; `collect` predicts unlabeled data.")
    if not targets.is_floating_point() and not (targets != IGNORED).any():
        raise DataError(f"no label counts: all are {IGNORED}.")
    return predictive, targets


def with_baseline(model: Any, name: str, baseline: Any) -> dict[str, Any]:
    """{name: network} of what is evaluated. Raises `ConfigError` if the model has the name of the baseline."""
    if baseline is None:
        return {name: model}
    if name == BASELINE:
        raise ConfigError(f"name={name!r} is what the baseline is called; choose another name for the model.")
    return {name: model, BASELINE: baseline}


def _predicts_next_token(model: Any) -> bool:
    if isinstance(model, FusedModel):
        model = model.networks[0]
    elif isinstance(model, BayesianModel):
        model = model.model
    return isinstance(model, nn.Module) and predicts_next_token(model)


def _plain(output: Any, task: TaskName) -> Predictive:
    """The output of an ordinary network as a predictive of one member and one sample."""
    logits: Any = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        raise DataError(
            f"the model must return a tensor of logits [batch, classes], or an object with .logits; "
            f"found {type(output).__name__}. Wrap it in a module that picks the logits."
        )
    if task != "regression" and logits.dim() < 2:
        raise DataError(f"logits must have shape [batch, classes]; found {tuple(logits.shape)}.")
    return Predictive.of(logits[None, None], task)


def _special_task(model: Any) -> TaskName | None:
    """The task of an ordinary network, if its labels alone would not tell it."""
    task = task_of(model) if isinstance(model, nn.Module) else None
    return task if task in ("multilabel", "segmentation") else None


def _fitted(prediction: Predictive, target: Tensor, index: int) -> Predictive:
    """The prediction at its targets' resolution. Fails on the batch that is wrong, not after all have been run."""
    if target.dim() == 0 or len(target) != len(prediction):
        raise DataError(f"batch {index} has labels of shape {tuple(target.shape)} for {len(prediction)} examples.")
    if prediction.task == "classification" and target.is_floating_point() and target.dim() == 2:
        raise DataError(f"batch {index} has probabilities as labels; to measure predictions, give the classes.")
    return prediction.fitted(target)


def _device(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        for tensors in (model.parameters(), model.buffers()):
            for tensor in tensors:
                return tensor.device
    return torch.device("cpu")


def _to(value: Any, device: torch.device) -> Any:
    if hasattr(value, "to"):  # tensors, packed sequences, tokenizer encodings
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(entry, device) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)([_to(entry, device) for entry in value])
    return value


def _tracked(batches: Iterable[Any], description: str, progress: bool) -> Iterator[Any]:
    try:
        total = len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader over a stream
        total = None
    with progress_bar(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        yield from bar.track(batches, total=total, description=description)
