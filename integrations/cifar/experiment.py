"""What CIFAR and ImageNet share: options on top of a recipe, the output folder, training, reports."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich import print
from torch import nn

from bayesify import BayesianModel, ConfigError, FineTuneConfig, FineTuner, FormatError, Rank1Config, evaluate
from bayesify.evaluation import evaluate_corruptions
from bayesify.files import check_output
from bayesify.recipes import Recipe


def configure(recipe: Recipe, given: Mapping[str, Any], options: Sequence[str] = ()) -> Recipe:
    """The recipe with fields replaced: by those in `given` that are not None, and by texts such as "init=normal".

    Unless one is given, the learning rate of SGD is scaled by the number of images in a step, as published.

    Raises:
        ConfigError: an option is not name=value with a field of one of the configs, or has no meaning.
    """
    known = {field.name for config in (Rank1Config, FineTuneConfig) for field in dataclasses.fields(config)}
    values = {name: value for name, value in given.items() if name in known and value is not None}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--option {text}: expected name=value with a field of Rank1Config or FineTuneConfig.")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    chosen = recipe.override(**values)
    if "learning_rate" in values or recipe.tuning.optimizer != "sgd":
        return chosen
    images = chosen.tuning.batch_size * chosen.tuning.accumulation
    return chosen.override(learning_rate=chosen.tuning.learning_rate * images / recipe.tuning.batch_size)


def has_checkpoint(output: Path, resume: bool) -> bool:
    """Whether there is a run to go on with; a `FormatError` if the folder must not be written to."""
    check_output(output)
    if not resume and any((output / name).exists() for name in ("log.jsonl", "checkpoint")):
        raise FormatError(f"{output} already holds a run; go on with it by --resume, or give another folder.")
    return resume and any((output / name).is_dir() for name in ("checkpoint", ".checkpoint.old"))


def some(dataset: Dataset, count: int | None) -> Dataset:
    """`count` evenly spaced rows; None is all."""
    if count is None or count >= len(dataset):
        return dataset
    return dataset.select([row * len(dataset) // count for row in range(count)])


def train(tuner: FineTuner, resume: bool) -> bool:
    """Train, and say what and how well. Afterwards only the main process goes on: it alone gets True."""
    model: nn.Module = tuner.model
    tuning, held_out = tuner.config, tuner.validation
    is_main = tuner.accelerator.is_main_process
    if is_main:
        print(
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tuner.train):,} images to train on, "
            f"{len(held_out) if held_out else 0:,} to choose the state by"
        )
        images = tuning.batch_size * tuning.accumulation
        print(f"{tuner.total_steps:,} steps of {images:,} images, learning rate {tuning.learning_rate:g}")
        if isinstance(model, BayesianModel):
            with torch.no_grad():
                print(f"KL at the start: {model.kl().item() / len(tuner.train):.4g} nats an example")
    result = tuner.fit(resume=resume)
    if is_main and result.best_nll is not None:
        print(f"Best validation NLL {result.best_nll:.4f} nats, at step {result.best_step} of {result.steps}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or the others would wait for the evaluation, and time out
    return is_main


def report(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[Any],
    corruptions: Mapping[str, Any],
    *,
    seed: int,
    output: Path,
    class_names: Sequence[str] | None = None,
) -> None:
    """Evaluate on clean batches and, if there are any options of `evaluate_corruptions`, on corrupted images."""
    is_bayesian = isinstance(model, BayesianModel)
    shared: dict[str, Any] = {"seed": seed, "output": output}
    shared |= {"name": "bayesian", "samples": recipe.samples} if is_bayesian else {"name": "deterministic"}
    print(evaluate(model, batches, class_names=class_names, **shared))
    if corruptions:
        print(evaluate_corruptions(model, **corruptions, **shared))
    print(f"Reports: {output / 'report.md'}" + (f", {output / 'corruptions.md'}" if corruptions else ""))
