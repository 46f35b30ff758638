"""What every test shares: one thread, no network, quiet libraries, real data where there is some."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Set here, before anything imports them, so that subprocesses started by a test are quiet as well.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["DATASETS_VERBOSITY"] = "error"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real data, `$BAYESIFY_DATA`."""
    folder = os.environ.get("BAYESIFY_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no real data: set BAYESIFY_DATA to the folder that holds it")
    return Path(folder)


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
