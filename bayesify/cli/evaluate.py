"""`bayesify evaluate`: how good are the probabilities of a model on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayesify.cli.models import check_draws, device_of, labeled, load_compared
from bayesify.cli.options import (
    AnyModel,
    Baseline,
    BatchSize,
    DataOptions,
    Dataset,
    Device,
    DrawSeed,
    MemberChunk,
    Samples,
    Split,
    TrustRemoteCode,
    with_options,
)
from bayesify.errors import DataError
from bayesify.files import check_output

if TYPE_CHECKING:
    from bayesify.data import PreparedDataset, Preprocessing


@with_options(data="Data")
def evaluate(
    model: AnyModel,
    dataset: Dataset,
    data: DataOptions,
    split: Split = "test",
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.md and pictures.", show_default=False)
    ] = None,
    ood: Annotated[
        str | None,
        typer.Option(
            help="Data set unlike the training data; its labels are ignored, its columns found by themselves.",
            show_default=False,
        ),
    ] = None,
    ood_split: Annotated[
        str | None,
        typer.Option(
            help="Split of it, by default test or what there is; without --ood, of DATASET.", show_default=False
        ),
    ] = None,
    baseline: Baseline = None,
    samples: Samples = None,
    member_chunk: MemberChunk = None,
    batch_size: BatchSize = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load data.")] = 0,
    seed: DrawSeed = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure accuracy, calibration and doubt of MODEL on DATASET."""
    if output is not None:
        check_output(output)
    from rich.console import Console

    from bayesify.data import make_loader
    from bayesify.evaluation import evaluate as run

    where = device_of(device)
    splits = data.load(dataset, split)
    loaded = load_compared(model, baseline, where, trust_remote_code)
    check_draws(loaded.model, model, samples, member_chunk)
    prepared = labeled(splits, next(iter(splits.named)), loaded.preprocessing, loaded.classes)
    outside = None
    if ood is not None or ood_split is not None:
        outside = _outside(
            dataset if ood is None else ood, ood_split, data if ood is None else DataOptions(), loaded.preprocessing
        )
    report = run(
        loaded.model,
        make_loader(prepared, batch_size, workers=workers),
        out_of_distribution=None if outside is None else make_loader(outside, batch_size, workers=workers),
        baseline=loaded.baseline,
        samples=samples,
        member_chunk=member_chunk,
        seed=seed,
        name=loaded.name,
        class_names=loaded.classes or None,
        output=output,
    )
    Console().print(report)
    if output is not None:
        typer.echo(f"Report: {output / 'report.md'}.")


def _outside(dataset: str, split: str | None, data: DataOptions, preprocessing: Preprocessing) -> PreparedDataset:
    """Out-of-distribution examples, made into inputs as the model's own are; labels dropped."""
    from bayesify.data import prepare

    splits = data.load(dataset, split, labels=False)
    names = [name for name in ("test", "validation", "train") if name in splits.named] or list(splits.named)
    if split is None and len(names) > 1 and names[0] not in ("test", "validation", "train"):
        raise DataError(f"{dataset} has the splits {', '.join(names)}; choose one with --ood-split.")
    return prepare(splits, names[0], preprocessing, labels=False)
