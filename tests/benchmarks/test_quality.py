"""The benchmark of fine-tuned networks on a task of three blobs: every row that needs no other library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
ROWS = "untouched,deterministic,ensemble,rank1,batchensemble,mc-dropout,swag,spread"
SCRIPT = """
import sys
from pathlib import Path

import finetuned
import torch
from tasks import Task, batches_of
from torch import nn
from torch.utils.data import TensorDataset

from bayesify import FineTuneConfig


def blobs(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centers = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    return TensorDataset(centers[labels] + torch.randn(count, 4, generator=generator) + shift, labels)


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def task():
    return Task(
        name="blobs",
        network=network,
        train=blobs(64, 0),
        validation=blobs(60, 1),
        tests={"clean": batches_of(blobs(90, 2)), "moved": batches_of(blobs(90, 3, 1.0))},
        outside={"far": batches_of(blobs(30, 4, 9.0))},
        tuning=FineTuneConfig(steps=40, batch_size=16, learning_rate=1e-2, eval_every=20),
        head="2",
        dropout=("2",),
    )


finetuned.TASKS["blobs"] = task
finetuned.main("blobs", rows=sys.argv[2], options="{}", seeds=2, output=Path(sys.argv[1]), table=True)
"""


def run(folder: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(folder / "out"), ROWS]
    environment = {**os.environ, "PYTHONPATH": str(QUALITY), "BAYESIFY_DATA": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_every_row_is_made_once_and_summed_up(tmp_path: Path) -> None:
    run(tmp_path)
    folder = tmp_path / "out" / "blobs"
    table = json.loads((folder / "table.json").read_text())
    assert list(table) == ROWS.split(",")
    nll = {row: columns["NLL"]["mean"] for row, columns in table.items()}
    assert max(nll[row] for row in ("deterministic", "ensemble", "rank1", "mc-dropout")) < nll["untouched"]
    assert table["deterministic"]["disagreement"]["mean"] == 0 < table["ensemble"]["disagreement"]["mean"]
    assert table["deterministic"]["AUROC far, MI"]["mean"] == pytest.approx(0.5, abs=0.2)

    runs = {path: path.read_text() for path in (folder / "runs").glob("*.json")}
    assert len(runs) == 8 + 2 * (len(ROWS.split(",")) - 1), "the deterministic networks of two ensembles of four"
    single = [json.loads((folder / "runs" / f"deterministic-default-seed{n}.json").read_text()) for n in range(4)]
    ensemble = json.loads((folder / "runs" / "ensemble-default-seed0.json").read_text())
    assert ensemble["plain"]["clean"]["nll"] < sum(one["plain"]["clean"]["nll"] for one in single) / 4

    for path in (*(folder / "runs").glob("*.safetensors"), folder / "runs" / "ensemble-default-seed0.json"):
        path.unlink()
    run(tmp_path)
    again = {path: path.read_text() for path in runs}

    def without_time(text: str) -> dict[str, object]:
        return {name: value for name, value in json.loads(text).items() if name != "seconds"}

    assert all(without_time(again[path]) == without_time(text) for path, text in runs.items())
