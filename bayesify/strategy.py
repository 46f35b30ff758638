"""How the members of a network are computed: all at once or one after the other, and what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayesify.batch import Rows, are_plain, map_tensors
from bayesify.cost import Workload
from bayesify.graph import Cut, find_cut, measure_work, on_shapes, record_calls
from bayesify.layers import MemberBatchNorm, Rank1Layer

Kind = tuple[Any, ...]
_TIMES = 97
"""How many times the batch a network is looked at with: so no other dimension is taken for it."""


@dataclass
class Strategy:
    """For inputs of one kind, of any number of examples.

    Attributes:
        workload: of one example; `None` if the network cannot be run on shapes alone.
        elements: of the inputs of that example.
        plain: whether members can be computed one after the other, and their outputs be joined.
        cut: where members part.
        verified: whether it was seen on values that the cut changes nothing.
    """

    workload: Workload | None = None
    elements: float = 1.0
    plain: bool = False
    cut: Cut | None = None
    verified: bool = False

    def members_at_once(self, members: int, args: Any, kwargs: Any, single: bool) -> int:
        """How many to compute at once."""
        if self.workload is None or members == 1:
            return members
        return self.workload.members_at_once(members, self.examples(args, kwargs), single)

    def examples(self, args: Any, kwargs: Any) -> float:
        """How many times the inputs of one example there are."""
        return _elements((args, kwargs)) / self.elements


class Strategies:
    """The strategy for each kind of inputs that a network was called with."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[Kind, Strategy] = {}

    def forget(self) -> None:
        """Look anew at the next call."""
        self._known.clear()

    def of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Strategy:
        """The strategy for these inputs; looked for, where such inputs are new, on shapes alone."""
        inputs = (args, dict(kwargs))
        if not are_plain(inputs) or not _elements(inputs):
            return Strategy()
        kind = (_kind(args), *((name, _kind(value)) for name, value in sorted(kwargs.items())))
        if kind not in self._known:
            self._known[kind] = _look(self._model, *inputs)
        return self._known[kind]


def _kind(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value))
    if isinstance(value, Tensor):
        return (value.dim(), value.dtype)
    return value if value is None or isinstance(value, (bool, str)) else type(value)


def _elements(inputs: Any) -> int:
    found: list[int] = []
    map_tensors(inputs, lambda t: found.append(t.numel()) if isinstance(t, Tensor) else None)
    return sum(found)


def _look(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Strategy:
    rows = Rows(model)
    cut = None
    try:
        batch = rows.batch_size(args, kwargs)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), on_shapes(model, (args, kwargs)) as (twin, fake):
            several = rows.expand(*fake, _TIMES)
            calls, output = record_calls(twin, several, batch * _TIMES)
            plain = are_plain(output) and not rows.recurrent
            if plain:
                cut = find_cut(twin, several, calls)
    except Exception:
        return Strategy()  # control flow on values, or an operation without a rule for shapes
    work = measure_work(model, calls, batch * _TIMES)
    own = (Rank1Layer, MemberBatchNorm)
    first = next((i for i, call in enumerate(calls) if isinstance(model.get_submodule(call.name), own)), 0)
    before = {call.name for call in calls[:first]} if cut is not None else set()
    workload = Workload(
        {name: value for name, value in work.items() if name not in before},
        {name: value for name, value in work.items() if name in before},
        _elements(output) / (batch * _TIMES),
    )
    return Strategy(workload, _elements((args, kwargs)) / batch, plain, cut)
