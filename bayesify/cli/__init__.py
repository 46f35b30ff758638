"""The command line: `bayesify inspect | convert | finetune | calibrate | evaluate | corruptions | predict | …`."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import bayesify
from bayesify.cli.calibrate import calibrate
from bayesify.cli.convert import convert
from bayesify.cli.corruptions import corruptions
from bayesify.cli.evaluate import evaluate
from bayesify.cli.finetune import finetune
from bayesify.cli.generate import generate
from bayesify.cli.inspect import inspect
from bayesify.cli.predict import predict
from bayesify.cli.push import push
from bayesify.errors import BayesifyError


class _Commands(TyperGroup):
    """Ends our own errors, and those of the file system, as one line and exit code 1; an interruption as 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (BayesifyError, OSError) as error:
            rank = os.environ.get("RANK", "0")
            who = "Error" if rank == "0" else f"Error (process {rank})"
            typer.secho(f"{who}: {' '.join(str(error).split())}", fg="red", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for _command in (inspect, convert, finetune, calibrate, evaluate, corruptions, predict, generate, push):
    app.command()(_command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bayesify {bayesify.__version__}")
        raise typer.Exit


@app.callback()
def bayesify_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a pretrained network into a rank-1 Bayesian one: convert, fine-tune, calibrate, evaluate, predict, share.

    A MODEL is a timm name (resnet50), a Hub id (timm/resnet50.a1_in1k, google-bert/bert-base-uncased) or a folder.
    A DATASET is a Hub id, a folder of images with one folder per class, or Parquet, CSV or JSON files.
    """


def main() -> None:
    app(prog_name="bayesify")
