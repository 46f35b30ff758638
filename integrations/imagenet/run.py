"""Train a ResNet-50 on ImageNet, as a rank-1 mixture or as it is, and evaluate it on clean and corrupted images.

    accelerate launch integrations/imagenet/run.py path/to/imagenet --output runs/imagenet --precision bf16 --workers 12

The folder holds train/<wnid>/*.JPEG and val/<wnid>/*.JPEG.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from folders import RandomCrops, class_names, imagenet_c, prepare_folder, read_folder
from rich import print
from torch import nn

from bayesify import BayesianModel, ConfigError, FineTuneConfig, FineTuner, Rank1Config, bayesify
from bayesify import recipes as published
from bayesify.data import Splits, make_loader, preprocessing_for
from bayesify.evaluation import ALEXNET_ERRORS, corruption_sets
from bayesify.hub import load_base, origin_of, save_timm_folder

sys.path.append(str(Path(__file__).parents[1] / "cifar"))
from experiment import configure, has_checkpoint, report, some, train

FINE_TUNING = published.Recipe("any", Rank1Config(), FineTuneConfig(), "The defaults of the library.")
DESCRIBED = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
"""What a timm folder says of its inputs."""


def main(
    data: Annotated[Path, typer.Argument(help="Folder with train/<wnid> and val/<wnid>.")],
    output: Annotated[Path, typer.Option(help="Folder for log, checkpoint, model and reports.")],
    model: Annotated[str, typer.Option(help="A name of timm, or a folder of one of its networks.")] = "resnet50",
    image_size: int = 224,
    validation: Annotated[
        float,
        typer.Option(help="Share of the training images that choose the state to keep; 0, as published: the last."),
    ] = 0.01,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="Train the network as it is.")] = False,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Fine-tune pretrained weights with the library's default options.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(help="Sets every option below that is not given; imagenet-gaussian from scratch.")
    ] = None,
    members: int | None = None,
    posterior: Annotated[str | None, typer.Option(help="Of the factors; deterministic is BatchEnsemble.")] = None,
    epochs: int | None = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images of a forward pass over all processes, before members repeat them.")
    ] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes of a step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="If it is not given, the recipe's, scaled with the images of a step.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read images, for each process that trains.")] = 0,
    option: Annotated[
        list[str] | None, typer.Option(help="Any other field of Rank1Config or FineTuneConfig: name=value. Repeatable.")
    ] = None,
    seed: int = 0,
    test_images: Annotated[int | None, typer.Option(help="Evaluate on so many, evenly spaced, not on all.")] = None,
    imagenet_c_folder: Annotated[
        Path | None, typer.Option("--imagenet-c", help="Folder with <corruption>/<severity>/<wnid>; gives the mCE.")
    ] = None,
    generate_corruptions: Annotated[
        int, typer.Option(help="Corrupt so many of the test images here, where ImageNet-C is not at hand.")
    ] = 0,
    corruption_cache: Annotated[Path | None, typer.Option(help="Folder that keeps images corrupted here.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run in the output folder stopped.")] = False,
) -> None:
    if deterministic and (members or posterior):
        raise ConfigError("members and posterior have no meaning with --deterministic, which adds no factors.")
    if pretrained and recipe:
        raise ConfigError("recipes are for training from scratch; --pretrained takes the library's defaults.")
    if imagenet_c_folder and generate_corruptions:
        raise ConfigError("give --imagenet-c or --generate-corruptions, not both.")
    start = FINE_TUNING if pretrained else published.recipe(recipe or "imagenet-gaussian")
    chosen = configure(start, locals(), option or ())
    tuning, goes_on = chosen.tuning, has_checkpoint(output, resume)
    splits = load_splits(data, test_images)
    if validation:
        splits = splits.split_validation(validation, seed)

    torch.manual_seed(seed)
    rank1 = None if deterministic else chosen.rank1
    network, preprocessing = build(model, splits.label_names, image_size, pretrained, rank1)
    test, batch = prepare_folder(splits.get("test"), preprocessing), min(tuning.batch_size, 128)
    loader = make_loader(test, batch, workers=workers)
    corruptions: dict[str, Any] = {}  # made here, so that a wrong folder is not found out after the training
    if imagenet_c_folder is not None:
        uncropped = replace(preprocessing, crop_pct=1.0)  # they are crops of 224 pixels already
        sets = imagenet_c(imagenet_c_folder, splits.label_names, uncropped, batch, workers)
        corruptions = {"data": itertools.chain([("clean", 0, loader)], sets)}
    elif generate_corruptions:
        corruption_sets(test, limit=generate_corruptions)
        corruptions = {"data": test, "limit": generate_corruptions, "cache": corruption_cache}
        corruptions |= {"batch_size": batch, "workers": workers}
    if corruptions:
        corruptions["reference_errors"] = ALEXNET_ERRORS

    images = prepare_folder(splits.get("train"), preprocessing, training=True, seed=seed)
    held_out = prepare_folder(splits.validation, preprocessing) if splits.validation is not None else None
    tuner = FineTuner(network, images, held_out, tuning, output=output)
    if pretrained and not deterministic:
        tuner.accelerator.print(
            f"Pretrained weights: factors start with init='{chosen.rank1.init}'. Random signs, as recipes from scratch "
            "have them, would destroy what the weights know."
        )
    if not train(tuner, goes_on):
        return
    save(network, output, preprocessing, splits.label_names, full=not pretrained)
    report(network, chosen, loader, corruptions, seed=seed, output=output)


def load_splits(root: Path, test_images: int | None) -> Splits:
    """The folders train and val, the latter as the test split."""
    classes = class_names(root / "train")
    train, test = (read_folder(root / name, classes) for name in ("train", "val"))
    return Splits("image", "image", "label", classes, train=train, test=some(test, test_images))


def build(
    name: str, classes: list[str], image_size: int, pretrained: bool, rank1: Rank1Config | None
) -> tuple[Any, Any]:
    """The network, converted unless `rank1` is None, and the preprocessing of its images."""
    base = load_base(name, label_names=classes, pretrained=pretrained)
    network: Any = base.model
    if pretrained:
        preprocessing = preprocessing_for(network, base.library, base.id, "image", image_size=image_size)
    else:
        preprocessing = RandomCrops((3, image_size, image_size))
        nn.init.normal_(network.get_classifier().weight, std=0.01)
        nn.init.zeros_(network.get_classifier().bias)
    if rank1 is not None:
        network = bayesify(network, rank1)
        network.origin, network.label_names = origin_of(base.model, base), classes
        network.preprocessing = preprocessing
    return network, preprocessing


def save(network: Any, output: Path, preprocessing: Any, classes: list[str], full: bool) -> None:
    """Save the network and say how to load it; `full` is with the weights that factors belong to."""
    if isinstance(network, BayesianModel):
        network.save_pretrained(output, full=full)
        print(f"To load it again: from_pretrained('{output}')")
    else:
        described = {name: getattr(preprocessing, name) for name in DESCRIBED}
        network.pretrained_cfg = {**network.pretrained_cfg, **described}
        save_timm_folder(network, output, classes)
        print(f"To load it again: load_base('{output}').model")


if __name__ == "__main__":
    typer.run(main)
