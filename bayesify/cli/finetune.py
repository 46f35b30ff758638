"""`bayesify finetune`: convert, fine-tune, evaluate and save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayesify.cli.models import classes_of, described, inputs_of, labeled, new_output, summary, told_of_heads
from bayesify.cli.options import (
    DataOptions,
    Dataset,
    Full,
    NoPretrained,
    TrustRemoteCode,
    field_names,
    refuse,
    with_options,
)
from bayesify.config import Rank1Config
from bayesify.errors import ConfigError, DataError, FormatError
from bayesify.files import replacing
from bayesify.finetune.config import FineTuneConfig

if TYPE_CHECKING:
    from torch import nn

    from bayesify.data import Preprocessing, Splits


@with_options(rank1="Rank-1 options", tuning="Training", data="Data")
def finetune(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A timm name, a Hub id or a folder; or a model that is already converted.", show_default=False
        ),
    ],
    dataset: Dataset,
    output: Annotated[
        Path, typer.Option(help="A new or empty folder for the model and its report.", show_default=False)
    ],
    rank1: Rank1Config,
    tuning: FineTuneConfig,
    data: DataOptions,
    validation_fraction: Annotated[
        float,
        typer.Option(
            help="Share of the training data to select the best state by, if there is no validation split; 0 for none.",
            rich_help_panel="Data",
        ),
    ] = 0.1,
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width instead of the model's own.", show_default=False, rich_help_panel="Data"),
    ] = None,
    max_length: Annotated[int, typer.Option(help="Token limit of texts.", rich_help_panel="Data")] = 128,
    color_jitter: Annotated[
        float, typer.Option(min=0, help="Strength of the random change of colors.", rich_help_panel="Data")
    ] = 0.0,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Start from published options, e.g. cifar10-gaussian; options given beside it win.", show_default=False
        ),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Fine-tune the network as it is, as a baseline under the same loop; saved as a base model.",
            show_default=False,
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.", show_default=False)
    ] = False,
    full: Full = False,
    no_pretrained: NoPretrained = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert MODEL, fine-tune it on DATASET, evaluate and save it.

    On several GPUs: accelerate launch -m bayesify finetune ...
    """
    checkpoint = _check_folder(output, resume)
    import torch
    from rich.console import Console

    from bayesify import BayesianModel, bayesify
    from bayesify.data import make_loader
    from bayesify.evaluation import evaluate
    from bayesify.finetune import FineTuner
    from bayesify.finetune.checkpoint import has_checkpoint
    from bayesify.hub import load_model, origin_of
    from bayesify.hub.card import write_card

    splits = data.load(dataset)
    if splits.label_column is None:
        raise DataError(f"{dataset} has no labels; name their column with --label-column.")
    splits.get("train")
    if validation_fraction:
        splits = splits.split_validation(validation_fraction, seed=tuning.seed)

    # All processes, and a resumed run, start with the same head and factors.
    torch.manual_seed(tuning.seed)
    classes = classes_of(splits)
    if len(classes) < 2:
        raise DataError(f"{dataset} has one class ({', '.join(classes)}); a classifier needs two or more.")
    network, base = load_model(
        model, label_names=classes, pretrained=not no_pretrained, trust_remote_code=trust_remote_code
    )
    converted = isinstance(network, BayesianModel)
    if converted:
        if deterministic:
            raise ConfigError(f"{model} is already Bayesian; --deterministic fine-tunes a base model.")
        fixed = [*field_names(Rank1Config), "recipe", "image_size", "max_length", "no_pretrained"]
        refuse(ctx, fixed, f"{model} is already converted, with options of its own.")
        if network.preprocessing is None:
            raise FormatError(f"{model} does not say how its inputs are made (preprocessing).")
        classes, preprocessing = network.label_names or classes, network.preprocessing
    else:
        options: dict[str, Any] = {"image_size": image_size}
        if splits.kind == "text":
            options = {"max_length": max_length, "pair": splits.text_pair_column is not None}
        preprocessing = inputs_of(network, base, splits.kind, trust_remote_code=trust_remote_code, **options)
        if deterministic:
            refuse(
                ctx,
                [*field_names(Rank1Config), "recipe"],
                "has no meaning with --deterministic, which adds no factors.",
            )
        else:
            network = described(bayesify(network, told_of_heads(rank1, base)), base, classes, preprocessing)

    train = labeled(splits, "train", preprocessing, classes, training=True, seed=tuning.seed, color_jitter=color_jitter)
    validation = None if splits.validation is None else labeled(splits, "validation", preprocessing, classes)
    measured = "test" if splits.test is not None else "validation" if splits.validation is not None else None
    held_out = None if measured is None else labeled(splits, measured, preprocessing, classes)
    tuner = FineTuner(network, train, validation, tuning, output=output)
    main = tuner.accelerator.is_main_process
    if main:
        typer.echo(_plan(splits, classes) + ("" if deterministic else f" {summary(network)}"))  # type: ignore[arg-type]
        if resume and not checkpoint:
            typer.echo(f"{output} has no checkpoint yet: starting from the beginning.")
    try:
        result = tuner.fit(resume=checkpoint)
    except KeyboardInterrupt:
        if main:
            where = f"from the last checkpoint in {output}" if has_checkpoint(output / "checkpoint") else "from step 0"
            typer.echo(f"Interrupted. The same command with --resume goes on {where}.", err=True)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or the others would wait for the evaluation, and time out
    if not main:
        return

    if isinstance(network, BayesianModel):  # before the evaluation, which may fail
        network.save_pretrained(output, full=full or no_pretrained)
    else:
        device = tuner.accelerator.device
        _save_base(network.cpu(), base.library, output, preprocessing, classes)
        network.to(device)
    report = None
    if held_out is not None:
        report = evaluate(
            network,
            make_loader(held_out, tuning.batch_size, workers=tuning.workers),
            samples=tuning.eval_samples,
            seed=tuning.seed,
            name="deterministic" if deterministic else "bayesian",
            class_names=classes,
            output=output,
        )
        if isinstance(network, BayesianModel):  # now with its numbers
            with replacing(output / "README.md") as card:
                write_card(card, network, network.origin or origin_of(network.model), output)
        Console().print(report)
    if result.best_step is not None:
        typer.echo(f"Best validation NLL {result.best_nll:.4f} nats, at step {result.best_step} of {result.steps}.")
    typer.echo(
        f"Model: {output}. Log: {output / 'log.jsonl'}."
        + (f" Report on the {measured} split: {output / 'report.md'}." if report else "")
    )


def _check_folder(output: Path, resume: bool) -> bool:
    """Whether there is a checkpoint to go on from; raises `FormatError` if the folder must not be written to."""
    from bayesify.finetune.checkpoint import has_checkpoint

    checkpoint = has_checkpoint(output / "checkpoint")
    if not checkpoint and not (output / "log.jsonl").exists():
        new_output(output)
    elif not resume:
        raise FormatError(f"{output} already holds a run; go on with it with --resume, or give another folder.")
    return checkpoint


def _plan(splits: Splits, classes: list[str]) -> str:
    sizes = ", ".join(f"{len(part)} {name}" for name, part in splits.named.items())
    return f"{len(classes)} classes; examples: {sizes}."


def _save_base(
    network: nn.Module, library: str, folder: Path, preprocessing: Preprocessing, classes: list[str]
) -> None:
    """Write a plain network as a folder that `load_base` reads, with how it was given its inputs."""
    from bayesify.data import ImagePreprocessing, TextPreprocessing
    from bayesify.hub import save_timm_folder

    if library == "timm":
        if isinstance(preprocessing, ImagePreprocessing):
            config: Any = network.pretrained_cfg
            network.pretrained_cfg = {**config, "input_size": preprocessing.input_size}  # type: ignore[assignment]
        save_timm_folder(network, folder, classes)
        return
    if isinstance(preprocessing, TextPreprocessing):
        preprocessing.tokenizer.model_max_length = preprocessing.max_length
    network.save_pretrained(folder)  # type: ignore[operator]
    preprocessing.save(folder)
