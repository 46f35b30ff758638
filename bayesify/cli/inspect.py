"""`bayesify inspect`: what would be converted."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from bayesify.cli.options import Model, NoPretrained, NumLabels, TrustRemoteCode, field_names, refuse, with_options
from bayesify.config import Rank1Config
from bayesify.errors import ConversionError


@with_options(rank1="Rank-1 options")
def inspect(
    ctx: typer.Context,
    model: Model,
    rank1: Rank1Config,
    num_labels: NumLabels = None,
    no_pretrained: NoPretrained = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Convert the model in memory and test on example inputs that every member reproduces the network, "
            "every site is reached and no example sees another's factors.",
            show_default=False,
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.", show_default=False)] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which layers of MODEL would get factors, which not and why, and what that adds. Nothing is changed."""
    from rich.console import Console

    import bayesify
    from bayesify.graph import derive_inputs
    from bayesify.hub import load_model

    network, _ = load_model(
        model, num_labels=num_labels, pretrained=not no_pretrained, trust_remote_code=trust_remote_code
    )
    if isinstance(network, bayesify.BayesianModel):
        names = [*field_names(Rank1Config), "num_labels", "no_pretrained", "check"]
        refuse(ctx, names, f"{model} is already converted, with options of its own.")
        report = network.report
    elif check:
        inputs = derive_inputs(network)
        if inputs is None:
            raise ConversionError(
                f"{type(network).__name__}: no example inputs could be derived; "
                "check it in Python with bayesify(model, example_inputs=...)."
            )
        args, kwargs = inputs
        report = bayesify.bayesify(network, rank1, example_inputs=kwargs or args).report
    else:
        report = bayesify.inspect(network, rank1)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    Console().print(report)
    if check:
        typer.echo(
            "Checked: with factors that change nothing every member reproduces the network, and every site is reached."
        )
