"""What each member has of its own, besides its factors: deterministic, and added to what all share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesify.added import Held


class MemberVector(Held):
    """Offsets [K, d] from a shared vector [d] (a bias, or scale and shift of a norm), 0 at the start.

    During a forward pass of a `BayesianModel` it holds the slice of members that are computed, and `value` has a row
    for each; outside of one, a single row, the average.
    """

    held: slice | None

    def __init__(self, members: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(members, size, device=device))

    def value(self) -> Tensor:
        """[k, d] offsets of the members in force, float32."""
        offset = self.offset.float()
        return offset.mean(0, keepdim=True) if self.held is None else offset[self.held]

    def extra_repr(self) -> str:
        return f"members={self.offset.shape[0]}, size={self.offset.shape[1]}"
