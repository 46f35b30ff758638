"""`bayesify corruptions`: how accuracy and calibration hold up as images get worse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from bayesify.files import check_output


@with_options(data="Data")
def corruptions(
    model: Annotated[
        str, typer.Argument(help="A saved Bayesian model (folder or Hub id), or any base model.", show_default=False)
    ],
    dataset: Dataset,
    data: DataOptions,
    split: Annotated[str, typer.Option(help="Split to evaluate on, or a part of it: test[:200].")] = "test",
    corruption: Annotated[
        list[str] | None,
        typer.Option(help="A corruption, e.g. fog; repeat it for several. The default is all 15.", show_default=False),
    ] = None,
    severity: Annotated[
        list[int] | None,
        typer.Option(help="A severity from 1 to 5; repeat it for several. The default is all.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Number of examples, evenly spaced; the default is all.", show_default=False)
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps the corrupted images for other models.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for corruptions.json, corruptions.md and a picture; an interrupted evaluation goes on there.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Another model to list beside, on the same inputs.", show_default=False)
    ] = None,
    mce: Annotated[
        bool,
        typer.Option("--mce", help="Also give the mCE, relative to AlexNet on ImageNet-C.", show_default=False),
    ] = False,
    samples: Samples = None,
    member_chunk: MemberChunk = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of one forward pass.")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that corrupt and load images.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the corruptions and the draws.")] = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure MODEL on the images of DATASET under 15 corruptions (noise, blur, weather, digital) at 5 severities."""
    if output is not None:
        check_output(output)
    from rich.console import Console

    from bayesify.evaluation import ALEXNET_ERRORS, evaluate_corruptions
    from bayesify.model import BayesianModel

    where = device_of(device)
    splits = data.load(dataset, split)
    network, preprocessing, classes = load_with_inputs(model, trust_remote_code)
    name = "bayesian" if isinstance(network, BayesianModel) else "deterministic"
    other = None
    if baseline is not None:
        other = load_baseline(baseline, model, classes, trust_remote_code).to(where)
        name = "bayesian" if name == "bayesian" else "model"
    try:
        report = evaluate_corruptions(
            network.to(where),
            labeled(splits, next(iter(splits.named)), preprocessing, classes),
            corruptions=corruption or None,
            severities=severity or (1, 2, 3, 4, 5),
            samples=samples,
            member_chunk=member_chunk,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            cache=cache,
            baseline=other,
            name=name,
            output=output,
            limit=limit,
            reference_errors=ALEXNET_ERRORS if mce else None,
        )
    except KeyboardInterrupt:
        if output is not None:
            say("Interrupted. The same command goes on with the next set.", err=True)
        raise
    Console().print(report)
    if output is not None:
        say(f"Report: {output / 'corruptions.md'}.")
