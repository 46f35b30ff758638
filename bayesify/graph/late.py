"""Late expansion: what comes before the first site is the same for all members, and is computed once.

A network is called with B rows; they become K·B at the inputs of one module, and of those that the same code calls
after it. Which module that is, is tried on shapes, from the first site outwards: the code around it may add what all
members share to what they do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bayesify.batch import Rows, is_target, map_tensors
from bayesify.graph.calls import Call, record_calls
from bayesify.graph.inputs import Inputs
from bayesify.layers import MemberBatchNorm, Rank1Layer

_MEMBERS = 3
"""How many are tried on shapes: not two, which inputs may be repeated for already."""


@dataclass(frozen=True)
class Cut:
    """Where members part.

    Attributes:
        at: the module at whose inputs they do.
        tail: it, and modules called after it by the code around it, whose inputs may still have B rows, with the
            arguments (by position or name) that do in the network as it is.
    """

    at: str
    tail: Mapping[str, frozenset[int | str]]


class Parting:
    """Lets B rows become K·B at a cut, for the length of a pass. Copies of it have none in force."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tail: Mapping[str, frozenset[int | str]] = {}
        self._batch = self._members = 0
        self._rows = Rows(nn.Module())
        self._handles: dict[str, Any] = {}

    def enter(
        self, rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, members: int, cut: Cut | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs of the network for so many members: of k·B rows, or of B if they part later."""
        self.end()
        if cut is None or members == 1:
            return rows.expand(args, kwargs, members)
        for name in cut.tail:
            if name not in self._handles:
                layer = self._model.get_submodule(name)
                self._handles[name] = layer.register_forward_pre_hook(_AtCall(self, name), with_kwargs=True)
        self._tail, self._batch, self._members = cut.tail, batch, members
        targets = {name: value for name, value in kwargs.items() if is_target(name)}
        return args, kwargs | rows.grow((), targets, batch, members)[1]

    def leave(self, output: Any) -> Any:
        """The output, of which all has k·B rows."""
        return self._rows.grow((output,), {}, self._batch, self._members)[0][0] if self._tail else output

    def end(self) -> None:
        """The pass is over."""
        self._tail = {}

    def remove(self) -> None:
        """Take away what tells of the calls at which members part; the next pass puts it there anew."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def grown(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of a module's call."""
        batched = self._tail.get(name, frozenset())
        with_batch = {str(key): value for key, value in (*enumerate(args), *kwargs.items()) if key in batched}
        grown = self._rows.grow((), with_batch, self._batch, self._members)[1]
        args = tuple(grown.get(str(place), value) for place, value in enumerate(args))
        return args, {key: grown.get(key, value) for key, value in kwargs.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tail": {}}


@dataclass
class _AtCall:
    """A hook that is copied with the network, and then belongs to the copy."""

    parting: Parting
    name: str

    def __call__(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return self.parting.grown(self.name, args, kwargs)


def find_cut(twin: nn.Module, inputs: Inputs, calls: list[Call]) -> Cut | None:
    """The innermost cut with which a network gives outputs of the right shapes; `None` where there is none, or nothing
    to be shared.

    Args:
        twin: the network on shapes alone.
        inputs: of a batch of a size that nothing else has.
        calls: of its modules on them.
    """
    modules = dict(twin.named_modules())
    own = (Rank1Layer, MemberBatchNorm)
    first = next((i for i, call in enumerate(calls) if isinstance(modules[call.name], own)), None)
    if first is None or not any(_computes(modules[call.name]) for call in calls[:first]):
        return None
    rows = Rows(twin)
    batch = rows.batch_size(*inputs)
    _, expected = record_calls(twin, rows.expand(*inputs, _MEMBERS), batch)
    stack = [*calls[first].callers, calls[first].name]
    for depth in range(len(stack) - 1, 0, -1):
        cut = _cut_at(stack[: depth + 1], calls)
        if cut is not None and _fits(twin, inputs, cut, batch, expected):
            return cut
    return None


def _computes(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _cut_at(stack: list[str], calls: list[Call]) -> Cut | None:
    """The cut at the last module of a stack of calls."""
    start = next(i for i, call in enumerate(calls) if [*call.callers, call.name] == stack)
    before = {call.name for call in calls[:start]}
    around = [tuple(stack[:depth]) for depth in range(1, len(stack))]
    after: dict[str, frozenset[int | str]] = {}
    for call in calls[start:]:
        if call.callers in around and call.name not in before:
            after[call.name] = after.get(call.name, frozenset()) | call.batched
    return None if stack[-1] in before else Cut(stack[-1], after)


def _fits(twin: nn.Module, inputs: Inputs, cut: Cut, batch: int, expected: Any) -> bool:
    parting = Parting(twin)
    try:
        _, output = record_calls(twin, parting.enter(Rows(twin), *inputs, batch, _MEMBERS, cut), batch)
    except Exception:
        return False  # B and K·B rows met
    finally:
        parting.remove()
    found, wanted = _shapes(output), _shapes(expected)
    main = Rows(twin).outputs
    return (
        len(found) == len(wanted)
        and main(output).shape == main(expected).shape
        and all(a == b or (a[:1] == (batch,) and a[1:] == b[1:]) for a, b in zip(found, wanted, strict=True))
    )


def _shapes(output: Any) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    map_tensors(output, lambda t: shapes.append(tuple(t.shape)) if isinstance(t, Tensor) else None)
    return shapes
