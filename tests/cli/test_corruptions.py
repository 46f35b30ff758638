"""`bayesify corruptions` in a process of its own, against the same evaluation in Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import run

import bayesify
from bayesify import from_pretrained
from bayesify.data import load_data, prepare
from bayesify.evaluation import CorruptionReport, evaluate_corruptions

pytestmark = pytest.mark.skipif(
    find_spec("imagecorruptions") is None, reason="the extra bayesify[corruptions] is not installed"
)


def test_corruptions_agree_with_python(vit: Path, images: Path, tmp_path: Path) -> None:
    assert run("convert", vit, tmp_path / "model", "--members", 2, "--num-labels", 3).exit_code == 0
    arguments = ["corruptions", tmp_path / "model", images, "--limit", 6, "--samples", 2, "--seed", 3]
    arguments += ["--corruption", "contrast", "--corruption", "shot_noise", "--severity", 1, "--severity", 5]
    arguments += ["--baseline", tmp_path / "model", "--cache", tmp_path / "cache", "--output", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": str(Path(bayesify.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bayesify"]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "bayesian" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "corruptions.json",
        "corruptions.jsonl",
        "corruptions.md",
        "corruptions.png",
    ]
    assert len(list((tmp_path / "cache").iterdir())) == 4

    bnn = from_pretrained(tmp_path / "model")
    prepared = prepare(load_data(images), "test", bnn.preprocessing)
    options = {"corruptions": ["contrast", "shot_noise"], "severities": [1, 5], "samples": 2, "seed": 3, "limit": 6}
    expected = evaluate_corruptions(bnn, prepared, **options, progress=False)
    stored = CorruptionReport.load(tmp_path / "out")
    assert [row for row in stored.sets if row["model"] == "bayesian"] == expected.sets
    summary = json.loads((tmp_path / "out" / "corruptions.json").read_text())["summary"]
    assert summary["bayesian"]["corrupted"] == expected.summary["bayesian"]["corrupted"]
    assert summary["deterministic"]["corrupted"] == expected.summary["bayesian"]["corrupted"]

    before = (tmp_path / "out" / "corruptions.jsonl").stat().st_mtime_ns
    assert run(*arguments).exit_code == 0  # of a finished evaluation: nothing is computed again
    assert (tmp_path / "out" / "corruptions.jsonl").stat().st_mtime_ns == before
    refused = run(*arguments, "--samples", 1)
    assert refused.exit_code == 1
    assert "samples (then 2, now 1)" in refused.stderr
