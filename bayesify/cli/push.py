"""`bayesify push`: share a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="A folder written by convert or finetune.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Where to on the Hub: owner/name.", show_default=False)],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.", show_default=False)
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default=False)] = None,
) -> None:
    """Upload a saved Bayesian model, its card and its pictures to the Hugging Face Hub, in one commit."""
    from bayesify.hub import push_folder

    typer.echo(push_folder(folder, repo_id, private=private or None, message=message))
