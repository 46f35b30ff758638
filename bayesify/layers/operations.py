"""Linear operations of torch as labeled products: which dimensions of a weight meet those of inputs and outputs.

A label is a letter for each dimension, as in einsum: F.linear is "...c,fc->...f". Of the weight's labels, those summed
over ("c") take s, those that only outputs have ("f") take r, those that all three have ("g") take both, and positions
of a kernel ("k") take none.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "einsum": (),
    **{f"conv{d}d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups") for d in (1, 2, 3)},
    **{
        f"conv_transpose{d}d": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
        for d in (1, 2, 3)
    },
}


@dataclass(frozen=True)
class Operation:
    """A product of inputs with one weight.

    Attributes:
        x, weight, bias: positions among the arguments; bias is None where there is none.
        labels: of inputs, weight and outputs. Inputs and outputs may start with "...".
    """

    x: int
    weight: int
    bias: int | None
    labels: tuple[str, str, str]

    @property
    def roles(self) -> str:
        """ "c", "f", "g" or "k" for each dimension of the weight."""
        x, weight, y = self.labels
        return "".join("k" if d not in x + y else "f" if d not in x else "g" if d in y else "c" for d in weight)


def operation_of(name: str, arguments: Sequence[Any], weight_dim: Callable[[Any], int | None]) -> Operation | None:
    """The operation of a call, or `None` if it is none with exactly one weight among its factors.

    Args:
        arguments: what the function gets, in order.
        weight_dim: number of dimensions of an argument that is a weight, `None` for any other.
    """
    name = name.strip("_")
    dims = [weight_dim(argument) for argument in arguments]
    weights = [position for position, dim in enumerate(dims) if dim is not None]
    if name == "einsum":
        return _einsum(arguments, weights)
    if name in ("addmm", "baddbmm"):
        if weights != [2]:
            return None
        labels = ("nc", "cf", "nf") if name == "addmm" else ("gnc", "gcf", "gnf")
        return Operation(1, 2, 0, labels)
    if name == "linear":
        if 1 not in weights or 0 in weights or dims[1] != 2:
            return None
        has_bias = len(arguments) > 2 and arguments[2] is not None
        return Operation(0, 1, 2 if has_bias else None, ("...c", "fc", "...f"))
    if name.startswith("conv"):
        return _convolution(name, arguments, weights, dims)
    if name in ("matmul", "mm", "bmm") and len(weights) == 1:
        dim = dims[weights[0]] or 0
        if dim < 2:
            return None
        shared = string.ascii_lowercase[7 : 7 + dim - 2]  # h, i, j: none of c, f, n
        if weights == [1]:
            return Operation(0, 1, None, (f"...{shared}nc" if shared else "...c", f"{shared}cf",
                                          f"...{shared}nf" if shared else "...f"))  # fmt: skip
        return Operation(1, 0, None, (f"...{shared}cn", f"{shared}fc", f"...{shared}fn"))
    return None


def arguments_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """The arguments of a call of a linear operation in order; `None` for other operations, and options unknown here."""
    order = _ARGUMENTS.get(name.strip("_"))
    if order is None:
        return None
    if not kwargs:
        return list(args)
    missing = order[len(args) :]
    if kwargs.keys() - set(missing):
        return None
    return [*args, *(kwargs.get(key) for key in missing)]


def with_argument(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], position: int, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with one of them replaced."""
    if position < len(args):
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, _ARGUMENTS[name][position]: value}


def is_bias(name: str, position: int) -> bool:
    """Whether an argument is only added to a product."""
    if name in ("addmm", "baddbmm"):
        return position == 0
    return _ARGUMENTS.get(name, ())[position : position + 1] == ("bias",)


def _convolution(name: str, arguments: Sequence[Any], weights: list[int], dims: list[int | None]) -> Operation | None:
    order = _ARGUMENTS[name]
    groups = order.index("groups")
    if 1 not in weights or 0 in weights or (len(arguments) > groups and arguments[groups] not in (None, 1)):
        return None
    space = (dims[1] or 2) - 2
    kernel = "fc" if not name.startswith("conv_transpose") else "cf"
    labels = ("nc" + "UVW"[:space], kernel + "klm"[:space], "nf" + "XYZ"[:space])
    has_bias = len(arguments) > 2 and arguments[2] is not None
    return Operation(0, 1, 2 if has_bias else None, labels)


def _einsum(arguments: Sequence[Any], weights: list[int]) -> Operation | None:
    if len(arguments) != 3 or not isinstance(arguments[0], str) or len(weights) != 1:
        return None
    equation = arguments[0].replace(" ", "")
    inputs, arrow, y = equation.partition("->")
    operands = inputs.split(",")
    if not arrow or len(operands) != 2:
        return None
    weight = weights[0]
    x = 3 - weight
    lx, lw = operands[x - 1], operands[weight - 1]
    if "." in lw or ("." in lx.lstrip(".")) or any(label not in lx + y for label in lw) or len(set(lw)) < len(lw):
        return None
    return Operation(x, weight, None, (lx, lw, y))


def letters(labels: str, dim: int) -> str:
    """One letter for each of `dim` dimensions; those that "..." stands for are capitals."""
    if labels.startswith("..."):
        labels = labels[3:]
        return (string.ascii_uppercase[: max(dim - len(labels), 0)] + labels)[-dim:]
    return labels[-dim:]


def arranged(values: Tensor, kept: str, labels: str, batch: str) -> Tensor:
    """Values [rows, sizes of the kept labels ...] shaped to combine with a tensor that has these labels."""
    sources = [0 if label == batch else 1 + kept.index(label) if label in kept else None for label in labels]
    shape = [1 if source is None else values.shape[source] for source in sources]
    return values.permute([source for source in sources if source is not None]).reshape(shape)
