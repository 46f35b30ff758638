"""Modules that a conversion adds to a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


class Added(nn.Module):
    """A module that was not in the original network: an original checkpoint, which has nothing for it, still loads."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]


class Held(Added):
    """An added module that is told what to compute with for the length of a forward pass.

    Attributes:
        held: what `hold` was told last; None outside of a pass, and never copied or saved.
    """

    held: Any

    def __init__(self) -> None:
        super().__init__()
        self.held = None

    def hold(self, value: Any) -> None:
        """Set what is in force; `None` ends it."""
        self.__dict__["held"] = value  # no parameter and no module, as nn.Module would look up in every call

    def train(self, mode: bool = True) -> Held:
        # What is held outlives a training forward, because gradient checkpointing runs layers again in backward.
        if not mode:
            self.held = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}
