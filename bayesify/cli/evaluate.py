"""`bayesify evaluate`: how good are the probabilities of a model on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayesify.cli.common import (
    DataOptions,
    Dataset,
    Device,
    MemberChunk,
    Samples,
    TrustRemoteCode,
    device_of,
    labeled,
    load_baseline,
    load_with_inputs,
    say,
    with_options,
)
from bayesify.errors import DataError
from bayesify.files import check_output

if TYPE_CHECKING:
    from bayesify.data import PreparedDataset, Preprocessing


@with_options(data="Data")
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A saved Bayesian model (folder or Hub id), or any base model.", show_default=False)
    ],
    dataset: Dataset,
    data: DataOptions,
    split: Annotated[str, typer.Option(help="Split to evaluate on, or a part of it: test[:200].")] = "test",
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.md and pictures.", show_default=False)
    ] = None,
    ood: Annotated[
        str | None, typer.Option(help="Data set unlike the training data; its labels are ignored.", show_default=False)
    ] = None,
    ood_split: Annotated[
        str | None,
        typer.Option(
            help="Split of it, by default test or what there is; without --ood, of DATASET.", show_default=False
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Another model to list beside, on the same inputs.", show_default=False)
    ] = None,
    samples: Samples = None,
    member_chunk: MemberChunk = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of one forward pass.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load data.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure accuracy, calibration and doubt of MODEL on DATASET."""
    if output is not None:
        check_output(output)
    from rich.console import Console

    from bayesify.data import make_loader
    from bayesify.evaluation import evaluate as run
    from bayesify.model import BayesianModel

    where = device_of(device)
    splits = data.load(dataset, split)
    network, preprocessing, classes = load_with_inputs(model, trust_remote_code)
    name = "bayesian" if isinstance(network, BayesianModel) else "deterministic"
    prepared = labeled(splits, next(iter(splits.named)), preprocessing, classes)
    outside = None
    if ood is not None or ood_split is not None:
        outside = _outside(
            dataset if ood is None else ood, ood_split, data if ood is None else DataOptions(), preprocessing
        )
    other = None
    if baseline is not None:
        other = load_baseline(baseline, model, classes, trust_remote_code).to(where)
        name = "bayesian" if name == "bayesian" else "model"
    report = run(
        network.to(where),
        make_loader(prepared, batch_size, workers=workers),
        out_of_distribution=None if outside is None else make_loader(outside, batch_size, workers=workers),
        baseline=other,
        samples=samples,
        member_chunk=member_chunk,
        seed=seed,
        name=name,
        class_names=classes or None,
        output=output,
    )
    Console().print(report)
    if output is not None:
        say(f"Report: {output / 'report.md'}.")


def _outside(dataset: str, split: str | None, data: DataOptions, preprocessing: Preprocessing) -> PreparedDataset:
    """Out-of-distribution examples, made into inputs as the model's own are; labels dropped."""
    from bayesify.data import prepare

    splits = data.load(dataset, split)
    names = [name for name in ("test", "validation", "train") if name in splits.named] or list(splits.named)
    if split is None and len(names) > 1 and names[0] not in ("test", "validation", "train"):
        raise DataError(f"{dataset} has the splits {', '.join(names)}; choose one with --ood-split.")
    return prepare(splits, names[0], preprocessing, labels=False)
