"""`bayesify corruptions`: how accuracy and calibration hold up as images get worse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayesify.cli.models import check_draws, device_of, labeled, load_compared
from bayesify.cli.options import (
    AnyModel,
    Baseline,
    BatchSize,
    DataOptions,
    Dataset,
    Device,
    MemberChunk,
    Samples,
    Split,
    TrustRemoteCode,
    with_options,
)
from bayesify.files import check_output


@with_options(data="Data")
def corruptions(
    model: AnyModel,
    dataset: Dataset,
    data: DataOptions,
    split: Split = "test",
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
    baseline: Baseline = None,
    mce: Annotated[
        bool,
        typer.Option("--mce", help="Also give the mCE, relative to AlexNet on ImageNet-C.", show_default=False),
    ] = False,
    samples: Samples = None,
    member_chunk: MemberChunk = None,
    batch_size: BatchSize = 32,
    workers: Annotated[int, typer.Option(min=0, help="Processes that corrupt and load images.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the corruptions and the draws.")] = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure MODEL on the images of DATASET under 15 corruptions (noise, blur, weather, digital) at 5 severities."""
    if output is not None:
        check_output(output)
    from rich.console import Console

    from bayesify.evaluation import ALEXNET_ERRORS, SEVERITIES, evaluate_corruptions

    where = device_of(device)
    splits = data.load(dataset, split)
    loaded = load_compared(model, baseline, where, trust_remote_code)
    check_draws(loaded.model, model, samples, member_chunk)
    try:
        report = evaluate_corruptions(
            loaded.model,
            labeled(splits, next(iter(splits.named)), loaded.preprocessing, loaded.classes),
            corruptions=corruption or None,
            severities=severity or SEVERITIES,
            samples=samples,
            member_chunk=member_chunk,
            seed=seed,
            batch_size=batch_size,
            workers=workers,
            cache=cache,
            baseline=loaded.baseline,
            name=loaded.name,
            output=output,
            limit=limit,
            reference_errors=ALEXNET_ERRORS if mce else None,
        )
    except KeyboardInterrupt:
        if output is not None:
            typer.echo("Interrupted. The same command goes on with the next set.", err=True)
        raise
    Console().print(report)
    if output is not None:
        typer.echo(f"Report: {output / 'corruptions.md'}.")
