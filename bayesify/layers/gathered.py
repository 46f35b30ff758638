"""Modules that hand single tokens to the layers inside them: mixtures of experts that call one expert at a time.

An expert gets the tokens that were sent to it, out of all rows. In such a module, indexing by tokens is watched, so
that the expert's layers know to which row each of their tokens belongs. Where a module multiplies with the weights of
all experts itself, tokens come sorted by expert, and are split into pieces.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bayesify.layers.registry import Derived
from bayesify.layers.site import TAKEN

T = TypeVar("T")
_ADDS = {"index_add", "index_add_"}
_MOVES = {"t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "T", "mT", "numpy_T"}


def hands_tokens_on(cls: type[nn.Module]) -> bool:
    """Whether the code of a class adds up results at the places that tokens were taken from."""
    return bool(_adding(cls))


@cache
def _adding(cls: type[nn.Module]) -> dict[str, Callable[..., Any]]:
    """The methods that do so; not every such module is called through its forward."""
    methods: dict[str, Callable[..., Any]] = {}
    for base in reversed(cls.__mro__):
        methods |= {name: value for name, value in vars(base).items() if inspect.isfunction(value)}
    return {name: method for name, method in methods.items() if _ADDS & _names_in(method)}


def _names_in(method: Callable[..., Any]) -> set[str]:
    code = getattr(inspect.unwrap(method), "__code__", None)
    return set() if code is None else {*code.co_names}


class Gathering(Derived):
    """A module in which the layers know the tokens that they were given."""

    prefix = "Gathering"

    def __init_subclass__(cls) -> None:
        for name, method in _adding(cls).items():
            setattr(cls, name, _watched(method))


def _watched(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with taken(None), _Watch():
            return method(self, *args, **kwargs)

    return watched


@contextmanager
def taken(tokens: tuple[Tensor, int] | None) -> Iterator[None]:
    """Tell which tokens are taken, for a while."""
    before = TAKEN.tokens
    TAKEN.tokens = tokens
    try:
        yield
    finally:
        TAKEN.tokens = before


class _Watch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__:
            _note(*args)
        elif func in (Tensor.index_add_, Tensor.index_add, torch.index_add):
            TAKEN.tokens = None
        return func(*args, **(kwargs or {}))


def _note(source: Tensor, index: Any) -> None:
    """Note which tokens `source[index]` takes, if it takes tokens: one list of places along one dimension."""
    entries = [entry for entry in (index if isinstance(index, tuple) else (index,)) if entry is not None]
    places = [(dim, entry) for dim, entry in enumerate(entries) if isinstance(entry, Tensor)]
    if len(places) == 1 and all(isinstance(entry, (Tensor, slice)) for entry in entries):
        dim, tokens = places[0]
        if tokens.dim() == 1:
            tokens = tokens.nonzero().squeeze(-1) if tokens.dtype == torch.bool else tokens
            TAKEN.tokens = (tokens, source.shape[dim])


class Known(Generic[T]):
    """What is known of some tensors. They are found by identity, which compiled code keeps, unlike their ids."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, T]] = []

    def add(self, tensor: Tensor, value: T) -> None:
        self._entries.append((tensor, value))

    def of(self, tensor: Any) -> T | None:
        """What was added last for a tensor; None for any other object."""
        for known, value in reversed(self._entries):
            if known is tensor:
                return value
        return None


class Pieces:
    """Which rows the pieces are that tokens [N, d] were split into, for the time of one forward."""

    def __init__(self) -> None:
        self._known: Known[tuple[Tensor, int]] = Known()

    def follow(self, name: str, values: tuple[Any, ...], result: Any) -> None:
        """Note what an operation called `name` makes of some values: pieces, or other things for the same tokens."""
        if name in ("split", "split_with_sizes") and len(values) > 1 and self._split(values[0], values[1], result):
            return
        of = next((of for of in map(self._known.of, values) if of is not None), None)
        if of is None or name in _MOVES:
            return
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor) and tensor.dim() and len(tensor) == len(of[0]):
                self._known.add(tensor, of)

    def _split(self, x: Tensor, sizes: Any, parts: tuple[Tensor, ...]) -> bool:
        """Whether the parts are pieces, each of a size of its own."""
        lengths = [len(part) for part in parts]
        if x.dim() != 2 or isinstance(sizes, int) or lengths != [*sizes] or sum(lengths) != len(x):
            return False
        tokens, count = TAKEN.tokens or (torch.arange(len(x), device=x.device), len(x))
        if len(tokens) != len(x):
            tokens, count = torch.arange(len(x), device=x.device), len(x)
        for part, own in zip(parts, tokens.split(lengths), strict=True):
            self._known.add(part, (own, count))
        return True

    def tokens(self, x: Tensor) -> tuple[Tensor, int] | None:
        """What is to be in force while factors are put around a product with x."""
        return self._known.of(x) or TAKEN.tokens
