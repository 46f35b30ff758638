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
