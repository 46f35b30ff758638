"""In what order modules call each other, and how much work each layer does: seen in one run on shapes alone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bayesify.batch import map_tensors
from bayesify.cost import Work
from bayesify.graph.inputs import Inputs
from bayesify.layers import Rank1Functional, Rank1Layer, functional_sizes, weight_sizes
from bayesify.modes import evaluating


@dataclass(frozen=True)
class Call:
    """One call of a module: by which modules, outermost first, the elements of what it got and gave, and which of its
    arguments hold a tensor with the batch in its first dimension."""

    name: str
    callers: tuple[str, ...]
    batched: frozenset[int | str]
    inputs: int = 0
    outputs: int = 0


@dataclass
class _Stack:
    calls: list[Call] = field(default_factory=list)
    open: list[tuple[str, int]] = field(default_factory=list)


def record_calls(twin: nn.Module, inputs: Inputs, batch: int) -> tuple[list[Call], Any]:
    """All calls of modules in the order in which they begin, and the output, for a batch of a size that nothing else
    has."""
    stack = _Stack()

    def has_batch(value: Any) -> bool:
        found: list[bool] = []
        map_tensors(value, lambda t: found.append(isinstance(t, Tensor) and t.shape[:1] == (batch,)))
        return any(found)

    def began(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            batched = frozenset(key for key, value in (*enumerate(args), *kwargs.items()) if has_batch(value))
            stack.calls.append(Call(name, tuple(caller for caller, _ in stack.open), batched))
            stack.open.append((name, len(stack.calls) - 1))

        return hook

    def ended(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        number = stack.open.pop()[1]
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, PackedSequence)))
        sizes = _elements(next(given, None)), _elements(output[0] if isinstance(output, tuple) else output)
        stack.calls[number] = replace(stack.calls[number], inputs=sizes[0], outputs=sizes[1])

    with ExitStack() as undo, evaluating(twin), torch.no_grad():
        for name, module in twin.named_modules():
            undo.callback(module.register_forward_pre_hook(began(name), with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(ended, with_kwargs=True).remove)
        output = twin(*inputs[0], **inputs[1])
    return stack.calls, output


def measure_work(model: nn.Module, calls: list[Call], batch: int) -> dict[str, Work]:
    """{name: work} of every layer with a linear map, for calls on `batch` examples."""
    seen: dict[str, list[Call]] = {}
    for call in calls:
        seen.setdefault(call.name, []).append(call)
    found: dict[str, Work] = {}
    for name, own in seen.items():
        layer = model.get_submodule(name)
        width = _width(layer)
        if width:
            found[name] = _work(layer, width, own, batch)
    return found


def _width(layer: nn.Module) -> int:
    """Output channels of a layer with a linear map; 0 of any other."""
    if isinstance(layer, Rank1Functional):
        return max((out for _, out in functional_sizes(layer, layer.rank1.roles).values()), default=0)
    if isinstance(layer, nn.RNNBase):  # its kernels give all gates
        return layer.hidden_size * (2 if layer.bidirectional else 1)
    sizes = type(layer).sizes(layer) if isinstance(layer, Rank1Layer) else weight_sizes(layer)
    return max((out for _, out in sizes.values()), default=0)


def _work(layer: nn.Module, width: int, calls: list[Call], batch: int) -> Work:
    weight = sum(p.numel() for n, p in layer.named_parameters() if p.dim() > 1 and not f".{n}".startswith(".rank1."))
    inputs, outputs = sum(call.inputs for call in calls) / batch, sum(call.outputs for call in calls) / batch
    products = 0.0 if isinstance(layer, nn.Embedding) else outputs / width * weight  # a lookup multiplies nothing
    return Work(len(calls), weight, inputs, outputs, products, isinstance(layer, Rank1Layer))


def _elements(value: Any) -> int:
    value = value.data if isinstance(value, PackedSequence) else value
    return value.numel() if isinstance(value, Tensor) else 0
