"""Data that every test of the evaluation shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bayesify.predictive import Predictive


@pytest.fixture
def case() -> tuple[Predictive, Tensor]:
    """K = 3, S = 2, B = 97, C = 5 with labels that the logits half know."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (97,), generator=generator)
    outputs = torch.randn(1, 1, 97, 5, generator=generator) + torch.randn(3, 2, 97, 5, generator=generator)
    outputs[:, :, torch.arange(97), targets] += 1.5
    return Predictive(outputs), targets
