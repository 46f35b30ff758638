"""Products of a module's own code with its parameters: what each dimension of a parameter is to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from bayesify.graph.capture import ParameterOf, operation_name
from bayesify.layers.functional import SAME, VIEWS
from bayesify.layers.operations import Operation, arguments_of, operation_of


class UnsupportedError(Exception):
    """A product that factors cannot go around; the message is the reason, for the report."""


def roles_of(node: fx.Node, weight: fx.Node, parameter_of: ParameterOf, shapes: Mapping[str, torch.Size]) -> str:
    """The role of each dimension of the one parameter that `weight`, an operand of the product `node`, is made of.

    See `bayesify.layers.operations` for the roles.

    Raises:
        UnsupportedError: the operation, or what becomes of the parameter before it, is none that factors can go around.
    """
    indices = _indices(weight, parameter_of, shapes)
    operation = _operation(node, weight, indices[0].dim())
    roles = []
    for index in indices:
        met = {role for j, role in enumerate(operation.roles) if _varies(index, j)}
        if len(met) > 1:
            raise UnsupportedError(f"inputs and outputs share a dimension of it in {operation_name(node)}")
        roles.append(met.pop() if met else "g")
    return "".join(roles)


def _operation(node: fx.Node, weight: fx.Node, dim: int) -> Operation:
    name = operation_name(node)
    arguments = arguments_of(name, _flat(node.args), dict(node.kwargs))
    operation = None
    if arguments is not None:
        operation = operation_of(name, arguments, lambda value: dim if value is weight else None)
    if operation is None:
        raise UnsupportedError(f"used through {name} in a way that has no rank-1 equivalent here")
    return operation


def _flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of einsum stand in a list in exported graphs."""
    return tuple(item for value in args for item in (value if isinstance(value, (list, tuple)) else [value]))


def _indices(node: fx.Node, parameter_of: ParameterOf, shapes: Mapping[str, torch.Size]) -> list[Tensor]:
    """For each dimension of the parameter: its index at every element of what `node` makes of it."""
    name = parameter_of(node)
    if name is not None:
        shape = shapes[name]
        grid = [[-1 if j == d else 1 for j in range(len(shape))] for d in range(len(shape))]
        return [torch.arange(n).view(view).expand(shape) for n, view in zip(shape, grid, strict=True)]
    source, *others = node.args or (None,)
    if not isinstance(source, fx.Node):
        raise UnsupportedError("made of several parameters")
    indices = _indices(source, parameter_of, shapes)
    is_property = node.op == "call_function" and node.target is getattr
    operation = str(others[0]) if is_property else operation_name(node).strip("_")
    if operation in SAME:
        return indices
    computed: list[fx.Node] = []
    fx.node.map_arg((others, node.kwargs), computed.append)  # type: ignore[arg-type]
    if operation not in VIEWS or computed:
        raise UnsupportedError(f"changed by {operation} before it is used")
    if node.op == "call_method":
        return [getattr(index, str(node.target))(*others, **node.kwargs) for index in indices]
    return [node.target(index, *others, **node.kwargs) for index in indices]  # type: ignore[operator]


def _varies(index: Tensor, dim: int) -> bool:
    """Whether an index changes along a dimension. Most are views of a range and say so by their strides."""
    if index.shape[dim] == 1:
        return False
    if index.stride(dim) == 0:
        return False
    return not torch.equal(index, index.narrow(dim, 0, 1).expand_as(index))
