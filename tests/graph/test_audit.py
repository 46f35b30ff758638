"""The audit tells what a network does anyway from what a conversion does wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bayesify import ConversionError, bayesify


class Masked(nn.Module):
    """What is not there scores minus infinity; softmax is of scores less the largest of the batch."""

    def __init__(self, masked: float = float("-inf")) -> None:
        super().__init__()
        self.scores, self.head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        y = self.head((scores - scores.max()).softmax(-1))
        return y.masked_fill(torch.arange(16) > 12, self.masked)


@pytest.mark.parametrize("masked", [float("-inf"), 0.0])
def test_masks_and_rounding_are_no_faults(masked: float) -> None:
    torch.manual_seed(0)
    report = bayesify(Masked(masked), members=2, example_inputs=8 * torch.randn(6, 16)).report
    assert set(report.converted) == {"scores", "head"}


class Hides(nn.Module):
    """Masks other entries when there are more rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).masked_fill(torch.arange(4) > 6 - len(x), float("-inf"))


def test_other_masks_are_a_fault() -> None:
    with pytest.raises(ConversionError, match="differs from the original by inf"):
        bayesify(Hides(), members=2, example_inputs=torch.randn(3, 4))
