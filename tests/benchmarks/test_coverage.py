"""The coverage harness on its fast subset: small networks of different kinds pass every check."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.coverage import timm_models, transformers_suite
from benchmarks.coverage.checks import check

RUN = Path(__file__).parents[2] / "benchmarks" / "coverage" / "run.py"
FAST = {"timm": timm_models.FAST, "transformers": transformers_suite.FAST}


@pytest.mark.parametrize("suite", ["timm", "transformers"])
def test_fast_subset_passes(suite: str, tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), suite, "--fast", "--workers", "1", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    rows = json.loads((tmp_path / suite / "results.json").read_text())["rows"]
    assert sorted(row["name"] for row in rows) == sorted(FAST[suite])
    for row in rows:
        assert (row["name"], row["status"], row.get("error")) == (row["name"], "ok", None)
        assert row["share"] == 1.0
        assert row["identity"] <= 1e-5


class Chained(nn.Module):
    """Multiplies with a matrix through a function that the library's graphs do not know as a product."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.linalg.multi_dot([x, self.matrix]))


class Faint(nn.Module):
    """A layer that matters so little that float32 holds the gradient of its weight, but not of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.faint = nn.Linear(4, 2), nn.Linear(4, 2, bias=False)
        nn.init.uniform_(self.faint.weight, 0.01, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.faint(x) * 1e-30 * 1e-14


def test_layers_too_faint_to_measure_are_idle() -> None:
    row = check(lambda: (Faint(), ((torch.randn(2, 4),), {})))
    assert (row["status"], row["idle"], row["still"]) == ("ok", ["faint"], [])


def test_failures_are_told_apart() -> None:
    inputs = ((torch.randn(2, 4),), {})
    assert check(lambda: (nn.Linear(3, 2), inputs))["status"] == "base"
    assert check(lambda: (nn.ReLU(), inputs))["status"] == "convert"
    row = check(lambda: (nn.Linear(4, 2), inputs))
    assert (row["status"], row["share"], row["sites"], row["identity"]) == ("ok", 1.0, 1, 0.0)
    row = check(lambda: (Chained(), inputs))
    assert (row["status"], row["silent"], row["converted_parameters"]) == ("probe", ["matrix"], 8)
    assert row["share"] == pytest.approx(8 / 24)


class SharedHeads(nn.Module):
    """Heads that share a weight, of which the output shows the last."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 2) for _ in range(2)])
        self.heads[1].weight = self.heads[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([head(x) for head in self.heads])[-1]


class Centered(nn.Module):
    """Subtracts the largest score of the batch before a softmax, which leaves rounding errors of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.head = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        return self.head((scores - scores.max()).softmax(-1))


def test_unused_heads_and_rounding_are_no_failures() -> None:
    row = check(lambda: (SharedHeads(), ((torch.randn(2, 4),), {})))
    assert (row["status"], row["idle"]) == ("ok", ["heads.0"])
    assert check(lambda: (Centered(), ((8 * torch.randn(2, 16),), {})))["status"] == "ok"
