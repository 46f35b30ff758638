"""`bayesify calibrate`, and `predict --alpha` after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

from bayesify import BayesianModel, from_pretrained
from bayesify.cli.models import labeled
from bayesify.data import load_data, make_loader
from bayesify.evaluation import collect_labeled
from bayesify.hub import load_base

CLASSES = ["cat", "dog", "emu"]


def probs_of(model: Any, images: Path, preprocessing: Any, **options: Any) -> torch.Tensor:
    splits = load_data(str(images), split="test")
    loader = make_loader(labeled(splits, "test", preprocessing, CLASSES), 32)
    return collect_labeled(model, loader, progress=False, **options)[0].probs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, vit: Path, images: Path) -> Path:
    """A plain network with a head for the three classes."""
    folder = tmp_path_factory.mktemp("base") / "run"
    options = ["--deterministic", "--steps", 6, "--batch-size", 6, "--seed", 1]
    assert run("finetune", vit, images, "--output", folder, *options).exit_code == 0
    return folder


def test_base_model_becomes_members_around_it(base: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibrated"
    result = run("calibrate", base, images, "--split", "train", "--members", 4, "--output", folder)
    assert result.exit_code == 0, result.output
    assert "as it was" in result.output
    bnn = from_pretrained(folder)
    assert bnn.members == 4
    assert f"Temperature {bnn.temperature:.3f}" in result.output
    assert bnn.temperature != 1.0
    assert bnn.conformal is not None
    assert len(bnn.conformal.scores) == 12, "the other half of 24 images"
    means = [factor.mean for _, _, factor in bnn.factors()]
    assert all(torch.allclose(mean.mean(0), torch.ones(mean.shape[1]), atol=1e-5) for mean in means)
    assert max(float((mean - 1).detach().abs().max()) for mean in means) > 0.01
    plain = load_base(base)
    before = probs_of(plain.model.eval(), images, bnn.preprocessing)
    after = probs_of(bnn, images, bnn.preprocessing)
    assert not torch.allclose(before, after, atol=1e-4)

    path = str(images / "test" / "dog" / "0.png")
    result = run("predict", folder, path, "--alpha", 0.2, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)
    assert row["classes"][0]["class"] in row["set"]
    assert set(row["set"]) <= set(CLASSES)
    shown = run("predict", folder, path, "--alpha", 0.2).output  # a narrow table breaks the list
    assert all(name in shown for name in row["set"])


def test_trained_members_keep_their_factors(trained: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibrated"
    result = run("calibrate", trained, images, "--split", "test", "--no-sets", "--output", folder)
    assert result.exit_code == 0, result.output
    before, after = from_pretrained(trained), from_pretrained(folder)
    assert (before.temperature, after.conformal) == (1.0, None)
    assert after.temperature != 1.0
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    result = run("predict", folder, images / "test" / "dog", "--alpha", 0.2)
    assert result.exit_code == 1
    assert "fit_sets" in result.output


def test_spread_to_draw_from_wants_draws(trained: Path, images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibrated"
    command = ["calibrate", trained, images, "--split", "train", "--spread", "fisher", "--output", folder]
    refused = run(*command)
    assert refused.exit_code == 1
    assert "--samples" in refused.output
    assert not folder.exists()
    assert run(*command, "--samples", 2, "--no-temperature").exit_code == 0
    before, after = from_pretrained(trained), from_pretrained(folder)
    scales = [[factor.scale for _, _, factor in bnn.factors()] for bnn in (before, after)]
    assert any(not torch.equal(a, b) for a, b in zip(*scales, strict=True))
    assert isinstance(after, BayesianModel)
    assert after.temperature == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--members", 3], "already converted"),
        (["--spread", "wide"], "unknown"),
        (["--split", "test[:1]"], "two halves"),
    ],
)
def test_bad_calibrations_write_nothing(
    trained: Path, images: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    folder = tmp_path / "calibrated"
    split = [] if "--split" in options else ["--split", "test"]
    result = run("calibrate", trained, images, "--output", folder, *split, *options)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not folder.exists()
