"""`bayesify convert`: convert without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayesify.cli.models import described, inputs_of, kind_of, new_output, summary, told_of_heads
from bayesify.cli.options import Full, Model, NoPretrained, NumLabels, TrustRemoteCode, with_options
from bayesify.config import Rank1Config
from bayesify.errors import ConversionError, FormatError


@with_options(rank1="Rank-1 options")
def convert(
    model: Model,
    output: Annotated[Path, typer.Argument(help="A new or empty folder.", show_default=False)],
    rank1: Rank1Config,
    num_labels: NumLabels = None,
    seed: Annotated[int, typer.Option(help="Of new heads and the factors' start.")] = 0,
    full: Full = False,
    no_pretrained: NoPretrained = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert MODEL without training and save it to OUTPUT."""
    new_output(output)
    import torch

    from bayesify import BayesianModel, bayesify
    from bayesify.hub import load_model

    torch.manual_seed(seed)
    network, base = load_model(
        model, num_labels=num_labels, pretrained=not no_pretrained, trust_remote_code=trust_remote_code
    )
    if isinstance(network, BayesianModel):
        raise ConversionError(f"{model} is already converted.")
    try:
        preprocessing = inputs_of(network, base, kind_of(network), trust_remote_code=trust_remote_code)
    except FormatError as error:
        preprocessing = None
        typer.echo(f"Note: {error} `bayesify evaluate` and `predict` will not know how to make inputs.", err=True)
    bnn = described(bayesify(network, told_of_heads(rank1, base)), base, base.label_names, preprocessing)
    bnn.save_pretrained(output, full=full or no_pretrained)
    typer.echo(f"{summary(bnn)} Saved to {output}.")
