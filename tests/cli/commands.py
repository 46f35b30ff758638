"""Helpers of the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner, Result

from bayesify.cli import app

SHORT = ["--members", "2", "--batch-size", "6", "--log-every", "1"]


def run(*arguments: object) -> Result:
    """A command in this process. Anything but a clean exit is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_images(folder: Path, classes: list[str], count: int) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            rng = np.random.default_rng([number, *name.encode()])
            pixels = rng.integers(0, 80, (32, 32, 3))
            pixels[..., {"cat": 0, "dog": 1}.get(name, 2)] += 120
            Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{number}.png")
