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
    cost: Annotated[
        bool,
        typer.Option(
            "--cost",
            help="What a prediction is expected to cost, layer by layer, and why members are computed as they are.",
            show_default=False,
        ),
    ] = False,
    first_site: Annotated[
        bool,
        typer.Option("--first-site", help="The same for factors that begin at each stage.", show_default=False),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.", show_default=False)] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which layers of MODEL would get factors, which not and why, and what that adds. Nothing is changed."""
    from rich.console import Console

    import bayesify
    from bayesify.cost_report import cost_report, first_site_report
    from bayesify.graph import derive_inputs
    from bayesify.hub import load_model

    if as_json:
        refuse(ctx, ["cost", "first_site"], "these tables are not part of the JSON report.")
    network, _ = load_model(
        model, num_labels=num_labels, pretrained=not no_pretrained, trust_remote_code=trust_remote_code
    )
    converted = isinstance(network, bayesify.BayesianModel)
    if converted:
        names = [*field_names(Rank1Config), "num_labels", "no_pretrained", "check", "first_site"]
        refuse(ctx, names, f"{model} is already converted, with options of its own.")
    inputs = derive_inputs(network.model if converted else network) if check or cost or first_site else None
    if inputs is None and (check or cost or first_site):
        raise ConversionError(
            f"{type(network).__name__}: no example inputs could be derived; give them in Python: "
            "bayesify(model, example_inputs=...), or bayesify.cost_report.cost_report."
        )
    tables: list[object] = []
    if converted:
        report = network.report
        if cost and inputs is not None:
            tables.append(cost_report(network, inputs))
    else:
        if first_site and inputs is not None:
            tables.append(first_site_report(network, rank1, inputs))
        report = bayesify.inspect(network, rank1)
        if inputs is not None and (check or cost):
            args, kwargs = inputs
            bnn = bayesify.bayesify(network, rank1, example_inputs=(kwargs or args) if check else None)
            report = bnn.report
            if cost:
                tables.insert(0, cost_report(bnn, inputs))
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    Console().print(report, *tables)
    if check:
        typer.echo(
            "Checked: with factors that change nothing every member reproduces the network, and every site is reached."
        )
