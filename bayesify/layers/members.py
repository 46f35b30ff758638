"""What each member has of its own, besides its factors: deterministic, and added to what all share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayesify.added import Added


class MemberVector(Added):
    """Offsets [K, d] from a shared vector [d] (a bias, or scale and shift of a norm), 0 at the start.

    During a forward pass of a `BayesianModel`, `value` has a row for each member that is computed; outside of one,
    a single row, the average.
    """

    def __init__(self, members: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(members, size, device=device))
        self._members: slice | None = None

    def hold(self, members: slice | None) -> None:
        """Choose the members that `value` gives; `None` ends it."""
        self._members = members

    def value(self) -> Tensor:
        """[k, d] offsets of the members in force, float32."""
        offset = self.offset.float()
        return offset.mean(0, keepdim=True) if self._members is None else offset[self._members]

    def train(self, mode: bool = True) -> MemberVector:
        if not mode:
            self._members = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_members": None}

    def extra_repr(self) -> str:
        return f"members={self.offset.shape[0]}, size={self.offset.shape[1]}"
