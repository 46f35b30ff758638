"""The corruptions of the package `imagecorruptions`, on the libraries of today.

Its last release (1.1.2) was written for scikit-image, numpy and setuptools of 2019. Its source is read and run as a
module of our own with the lines below replaced: neither the package nor `sys.modules` is changed for others.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayesify.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

REPLACED = {
    "from pkg_resources import resource_filename": "",  # given below; left setuptools in version 82
    "from scipy.ndimage.interpolation import": "from scipy.ndimage import",
    "np.float_)": "np.float64)",
    "multichannel=True": "channel_axis=-1",
    # This one would draw from fresh entropy instead of numpy's global state.
    "mode='s&p', amount=c": "mode='s&p', amount=c, rng=np.random.randint(2**31)",
}


def versions() -> str:
    """What makes the pixels, e.g. "imagecorruptions 1.1.2, opencv 5.0.0, …", or a `ConfigError` if it is missing."""
    _functions()
    import cv2
    import numpy as np
    import scipy
    import skimage

    libraries = {"opencv": cv2, "scikit-image": skimage, "scipy": scipy, "numpy": np}
    found = {"imagecorruptions": version("imagecorruptions")} | {n: m.__version__ for n, m in libraries.items()}
    return ", ".join(f"{name} {number}" for name, number in found.items())


def corrupt(image: Image, corruption: str, severity: int) -> Image:
    """`image` (RGB, at least 32×32) with a corruption of severity 1 to 5, drawn from numpy's global random state.

    Raises:
        ConfigError: the package is not installed.
    """
    import numpy as np
    from PIL import Image as PILImage

    functions = _functions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PILImage.fromarray(np.uint8(functions[corruption](image, severity)))


@cache
def _functions() -> dict[str, Any]:
    folder = _folder()
    path = folder / "corruptions.py"
    source = path.read_text(encoding="utf-8")
    for old, new in REPLACED.items():
        source = source.replace(old, new)
    functions: dict[str, Any] = {
        "__name__": "imagecorruptions.corruptions",
        "resource_filename": lambda _, name: str(folder / name),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile(source, str(path), "exec"), functions)
        except ImportError as error:
            raise ConfigError(f'corruptions need {error.name}: pip install "bayesify[corruptions]".') from error
    return functions


def _folder() -> Path:
    spec = find_spec("imagecorruptions")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError('corruptions need the package imagecorruptions: pip install "bayesify[corruptions]".')
    return Path(spec.submodule_search_locations[0])
