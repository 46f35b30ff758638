"""Priors of the factors, element by element."""

from __future__ import annotations

from typing import ClassVar

from torch import nn


class Prior(nn.Module):
    """p(f) of every element of a factor."""

    family: ClassVar[str]


class NormalPrior(Prior):
    """p(f) = N(loc, scale²)."""

    family = "normal"

    def __init__(self, loc: float, scale: float) -> None:
        super().__init__()
        self.loc = loc
        self.scale = scale

    def extra_repr(self) -> str:
        return f"loc={self.loc}, scale={self.scale}"


PRIORS: dict[str, type[NormalPrior]] = {NormalPrior.family: NormalPrior}
