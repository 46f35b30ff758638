"""Capture one forward at a time: a module's own Python as a small graph, with its children as leaves.

A graph is a plan, not a replacement: it shows which weights are used without calling their layer and which layers
see an input that does not carry the batch.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bayesify.layers.operations import arguments_of, is_bias

_LINEAR_FUNCTIONS: set[Any] = {
    operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, torch.mv,
    torch.tensordot, torch.inner, F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d,
    torch.conv3d,
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.multi_head_attention_forward,
}  # fmt: skip
_LINEAR_NAMES = {
    "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "mv", "linear", "bilinear", "conv1d", "conv2d", "conv3d",
    "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "_native_multi_head_attention", "_transformer_encoder_layer_fwd", "_grouped_mm",
}  # fmt: skip
_TRACED = {"torch", "_operator", "builtins", "math"}
"""Packages whose functions are what they are called."""

ParameterOf = Callable[[fx.Node], str | None]
"""The full name of the parameter that a node of a graph stands for, if any."""


class _OneForward(fx.Tracer):
    """The stock tracer, stopping at every child."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass(frozen=True)
class Use:
    """A linear operation of a graph, or what may lead to one elsewhere (the call of a module or of a function that is
    not traced, the output), with operands made of parameters alone: these nodes, and what they are made of."""

    node: fx.Node
    weights: dict[fx.Node, frozenset[str]]
    carries_batch: bool

    @property
    def parameters(self) -> frozenset[str]:
        return frozenset().union(*self.weights.values())

    @property
    def operation(self) -> str:
        return operation_name(self.node)


def capture(module: nn.Module) -> fx.Graph | None:
    """The graph of `module.forward`, or `None` where Python tracing does not get through it."""
    try:
        return _OneForward().trace(_stand_in(module))
    except Exception:
        # Control flow, **kwargs and foreign functions all fail in ways of their own; none of them is an error here.
        return None


def _stand_in(module: nn.Module) -> nn.Module:
    """A shallow copy with buffers of its own: tracing runs the code of forward, which may count batches or set
    attributes, and a plan must not change the model."""
    twin = copy.copy(module)
    for kind in ("_parameters", "_modules"):
        twin.__dict__[kind] = dict(module.__dict__[kind])
    twin.__dict__["_buffers"] = {n: None if b is None else b.clone() for n, b in module._buffers.items()}
    return twin


def linear_uses(
    nodes: Iterable[fx.Node], parameter_of: ParameterOf, is_input: Callable[[fx.Node], bool]
) -> tuple[list[Use], list[fx.Node]]:
    """Follow parameters and inputs through a graph.

    Returns:
        The linear operations with an operand computed from parameters alone, with the calls of child modules and of
        functions that are not traced that are given one beside an input, and the output if it is one; and the calls of
        child modules whose arguments do not depend on any input.
    """
    sources: dict[fx.Node, frozenset[str]] = {}
    batch: dict[fx.Node, bool] = {}
    uses: list[Use] = []
    constant_calls: list[fx.Node] = []
    for node in nodes:
        name = parameter_of(node)
        operands = node.all_input_nodes
        batch[node] = is_input(node) or any(batch[operand] for operand in _values(node, operands))
        if name is not None:
            sources[node] = frozenset([name])
            continue
        sources[node] = frozenset().union(*(sources[operand] for operand in operands if not batch[operand]))
        if node.op == "call_module" and not batch[node]:
            constant_calls.append(node)
        weights = [
            operand for operand in operands if sources[operand] and not batch[operand] and not _added(node, operand)
        ]
        handed_on = node.op == "output" or (batch[node] and (node.op == "call_module" or is_untraced(node)))
        if weights and (handed_on or is_linear_operation(node)):
            uses.append(Use(node, {operand: sources[operand] for operand in weights}, batch[node]))
        if batch[node]:
            sources[node] = frozenset()
    return uses, constant_calls


def is_linear_operation(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _LINEAR_FUNCTIONS or operation_name(node) in _LINEAR_NAMES
    return node.op == "call_method" and str(node.target).strip("_") in _LINEAR_NAMES


def is_untraced(node: fx.Node) -> bool:
    """Whether a node calls a function that its author keeps out of graphs (`torch.fx.wrap`): none of torch's."""
    package = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return node.op == "call_function" and package not in _TRACED


def _values(node: fx.Node, operands: list[fx.Node]) -> list[fx.Node]:
    """The operands whose values the result depends on: not those that only lend their shape, type or device."""
    if node.op == "call_function" and node.target is getattr:
        return [] if node.args[1] in ("shape", "ndim", "dtype", "device") else operands
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return []
    return operands[:1] if operation_name(node) in ("type_as", "view_as", "reshape_as", "expand_as") else operands


def is_tensor_input(node: fx.Node) -> bool:
    """Whether a node of a captured forward is one of its arguments and, as far as annotations say, no number."""
    return node.op == "placeholder" and node.type not in (int, float, bool, str, "int", "float", "bool", "str")


def _added(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a linear operation only adds this operand, as its bias."""
    name = operation_name(node).strip("_")
    arguments = arguments_of(name, tuple(node.args), dict(node.kwargs)) or []
    positions = [position for position, argument in enumerate(arguments) if argument is operand]
    return bool(positions) and all(is_bias(name, position) for position in positions)


def operation_name(node: fx.Node) -> str:
    """`linear` for F.linear, for aten.linear.default and for the method of that name."""
    if isinstance(node.target, str):
        return node.target
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet)).rpartition(".")[2]
