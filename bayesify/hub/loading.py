"""What loading from timm and from transformers share: quiet libraries and one error for no network."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayesify.errors import BayesifyError, FormatError


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file} must hold an object; found {type(content).__name__}.")
    return content


def not_downloaded(id: str, error: Exception) -> BayesifyError:
    return BayesifyError(
        f"{id!r} could not be downloaded: {brief(error)} Check the name and the connection, or give a "
        "folder that holds the model."
    )


def brief(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the chatter about new heads out of the terminal: `Base.new_parameters` has it."""
    from transformers.utils import logging as hub_logging

    timm_logger = logging.getLogger("timm")
    verbosity, bars, timm_level = (
        hub_logging.get_verbosity(),
        hub_logging.is_progress_bar_enabled(),
        timm_logger.level,
    )
    hub_logging.set_verbosity_error()
    hub_logging.disable_progress_bar()
    timm_logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        timm_logger.setLevel(timm_level)
        if bars:
            hub_logging.enable_progress_bar()
