"""Train a wide residual network on CIFAR from scratch, as a rank-1 mixture or as it is, and evaluate it.

python integrations/cifar/run.py --output runs/cifar10
python integrations/cifar/run.py --output runs/cifar100 --data uoft-cs/cifar100 --recipe cifar100-cauchy
accelerate launch integrations/cifar/run.py --output runs/cifar10 --precision bf16
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from data import PREPROCESSING, Images, load_splits
from experiment import configure, has_checkpoint, report, some, train
from rich import print
from safetensors.torch import save_model
from torch import nn
from wide_resnet import WideResNet

from bayesify import BayesianModel, ConfigError, FineTuner, bayesify
from bayesify import recipes as published
from bayesify.data import make_loader, prepare
from bayesify.evaluation import SEVERITIES, corruption_sets


def main(
    output: Annotated[Path, typer.Option(help="Folder for log, checkpoint, model and reports.")],
    data: Annotated[str, typer.Option(help="Hub id, or folder of Parquet files with a train and a test split.")] = (
        "uoft-cs/cifar10"
    ),
    label_column: Annotated[str | None, typer.Option(help="Found by itself; fine_label for CIFAR-100.")] = None,
    validation: Annotated[
        float,
        typer.Option(help="Share of the training images that choose the state to keep; 0, as published: the last."),
    ] = 0.05,
    depth: int = 28,
    width: int = 10,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Train the network as it is.")] = False,
    recipe: Annotated[str, typer.Option(help="Sets every option below that is not given.")] = "cifar10-gaussian",
    members: int | None = None,
    posterior: Annotated[str | None, typer.Option(help="Of the factors; deterministic is BatchEnsemble.")] = None,
    factors: Annotated[str | None, typer.Option(help="inputs, outputs or both.")] = None,
    likelihood: Annotated[str | None, typer.Option(help="average or mixture.")] = None,
    epochs: int | None = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of a step over all processes, before members repeat them.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="If it is not given, the recipe's times batch size / 128, as published.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Any other field of Rank1Config or FineTuneConfig: name=value. Repeatable.")
    ] = None,
    seed: int = 0,
    test_images: Annotated[int | None, typer.Option(help="Evaluate on so many, evenly spaced, not on all.")] = None,
    corrupted_images: Annotated[int | None, typer.Option(help="Corrupt so many of them; 0 for none.")] = None,
    corruption: Annotated[list[str] | None, typer.Option(help="One of the 15, instead of all. Repeatable.")] = None,
    severity: Annotated[list[int] | None, typer.Option(help="1 to 5, instead of all. Repeatable.")] = None,
    corruption_cache: Annotated[Path | None, typer.Option(help="Folder that keeps corrupted images.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run in the output folder stopped.")] = False,
) -> None:
    chosen = configure(published.recipe(recipe), locals(), option or ())
    if deterministic and (members or posterior or factors or likelihood):
        raise ConfigError("members, posterior, factors and likelihood have no meaning with --deterministic.")
    tuning, goes_on = chosen.tuning, has_checkpoint(output, resume)
    splits = load_splits(data, label_column)
    classes, columns = splits.label_names, (splits.input_column, str(splits.label_column))
    test = prepare(dataclasses.replace(splits, test=some(splits.get("test"), test_images)), "test", PREPROCESSING)
    batch = min(tuning.batch_size, 128)
    corruptions: dict[str, Any] = {}
    if corrupted_images != 0:
        sets = {"corruptions": corruption or None, "severities": severity or SEVERITIES, "limit": corrupted_images}
        corruption_sets(test, **sets)  # what it finds wrong is not for after the training
        corruptions = {"data": test, **sets, "batch_size": batch, "workers": tuning.workers, "cache": corruption_cache}
    if validation:
        splits = splits.split_validation(validation, seed)
    images = Images.read(splits.get("train"), *columns, training=True, seed=seed)
    held_out = Images.read(splits.validation, *columns) if validation and splits.validation is not None else None

    torch.manual_seed(seed)
    model: Any = WideResNet(depth, width, len(classes))
    if not deterministic:
        model = bayesify(model, chosen.rank1)
        model.label_names, model.preprocessing = classes, PREPROCESSING
    if not train(FineTuner(model, images, held_out, tuning, output=output), goes_on):
        return
    save(model, output, f"WideResNet({depth}, {width}, {len(classes)})")
    # The draws of an example depend on its batch: with the same batches both reports agree on the clean images.
    batches = make_loader(test, batch, workers=tuning.workers)
    report(model, chosen, batches, corruptions, seed=seed, output=output, class_names=classes)


def save(model: nn.Module, output: Path, network: str) -> None:
    """Save the model and say how to load it; `network` is the code that builds the one below."""
    if isinstance(model, BayesianModel):
        model.save_pretrained(output)
        print(f"To load it again: from_pretrained('{output}', base_model={network})")
    else:
        save_model(model, str(output / "model.safetensors"))
        print(f"To load it again: safetensors.torch.load_model({network}, '{output / 'model.safetensors'}')")


if __name__ == "__main__":
    typer.run(main)
