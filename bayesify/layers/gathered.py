"""Modules that hand single tokens to the layers inside them: mixtures of experts that call one expert at a time.

An expert gets the tokens that were sent to it, out of all rows. In such a module, indexing by tokens is watched, so
that the expert's layers know to which row each of their tokens belongs.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bayesify.layers.registry import Derived
from bayesify.layers.site import TAKEN


@cache
def hands_tokens_on(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class, by its source, adds up results at the places that tokens were taken from."""
    if cls.__module__.startswith("torch."):
        return False
    try:
        return "index_add" in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


class Gathering(Derived):
    """A module in which the layers know the tokens that they were given."""

    prefix = "Gathering"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = TAKEN.set(None)
        try:
            with _Watch():
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            TAKEN.reset(before)


class _Watch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            _note(*args)
        elif func in (Tensor.index_add_, Tensor.index_add, torch.index_add):
            TAKEN.set(None)
        return func(*args, **(kwargs or {}))


def _note(source: Tensor, index: Any) -> None:
    """Note which tokens `source[index]` takes, if it takes tokens: one list of places along one dimension."""
    entries = [entry for entry in (index if isinstance(index, tuple) else (index,)) if entry is not None]
    places = [(dim, entry) for dim, entry in enumerate(entries) if isinstance(entry, Tensor)]
    if len(places) == 1 and all(isinstance(entry, (Tensor, slice)) for entry in entries):
        dim, tokens = places[0]
        if tokens.dim() == 1:
            tokens = tokens.nonzero().squeeze(-1) if tokens.dtype == torch.bool else tokens
            TAKEN.set((tokens, source.shape[dim]))
