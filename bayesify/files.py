"""Files and folders: written whole or not at all, and never over somebody else's."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bayesify.errors import FormatError

CONFIG_FILE = "bayesify_config.json"
WEIGHTS_FILE = "bayesify.safetensors"
TOKENIZER_FILES = ("*.txt", "*.model", "*.jinja", "*.codes", "*.tiktoken")
"""What tokenizers write beside JSON: vocabularies, merges and templates of chats."""
SAVING = ".saving-"
"""How the name of a folder begins in which a model is written before it takes its place."""
OUR_FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    "log.jsonl",
    "checkpoint",
    "report.json",
    "predictions.jsonl",
    "corruptions.jsonl",
)
"""A folder that holds one of these was written by bayesify."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` if the block ends well.

    A reader never sees half a file, and a failure leaves what was there before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, *, indent: int | None = 2, allow_nan: bool = True) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=indent, allow_nan=allow_nan) + "\n")


def _is_left_over(name: str) -> bool:
    """Whether a file or folder is what a killed process of ours left behind."""
    return name.startswith(SAVING) or (name.startswith(".") and name.endswith(".tmp"))


def check_output(folder: str | Path) -> Path:
    """A folder that is new, empty or ours; anything else is a `FormatError`, with nothing touched."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is a file; expected a folder to write to.")
    if folder.is_dir():
        found = sorted(path.name for path in folder.iterdir() if not _is_left_over(path.name))
        if found and not any(name in OUR_FILES for name in found):
            raise FormatError(
                f"{folder} already holds something else ({', '.join(found[:3])}); give a new or empty folder."
            )
    return folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The content of a safetensors file, or a `FormatError` naming it."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: not found.") from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: truncated or not a safetensors file ({error}).") from error


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The JSON object in a file of ours, or a `FormatError` naming it; `missing` says what its absence means."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: not found; {missing}.") from error
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: truncated or not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected a JSON object; found {type(content).__name__}.")
    return content
