"""Rank-1 maps that a module's own code applies to parameters: F.linear(x, self.weight), x @ W, einsum, convolutions.

Such a module becomes an instance of a subclass whose forward is its own, watched: where one of its parameters, or a
view of it, is multiplied with an activation, the factors go around the product. Views are followed by what lies
beneath: every element of a parameter knows its index among the inputs (where s is) and among the outputs (r). So are
tokens that the forward splits into pieces, one for each of several weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bayesify.errors import BayesifyError, ConversionError
from bayesify.layers.gathered import Known, Pieces, taken
from bayesify.layers.operations import Operation, arguments_of, arranged, letters, operation_of, with_argument
from bayesify.layers.registry import Derived, Rank1Layer, derived_class, detach, replace_class
from bayesify.layers.site import AdditiveSite, Site, check_channels, repeat_rows

VIEWS = {
    "getitem", "t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "view", "reshape", "flatten",
    "unflatten", "squeeze", "unsqueeze", "chunk", "split", "split_with_sizes", "unbind", "narrow", "select", "slice",
    "view_as", "tensor_split", "index_select", "T", "mT", "numpy_T",
}  # fmt: skip
"""Operations that only rearrange a weight."""
SAME = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "detach", "clone", "alias"}
"""Operations that keep every element of a weight where it is."""


class FunctionalSites(nn.ModuleDict):
    """Sites by the path of their parameter, with "/" for ".", and what each dimension of a parameter is to its map."""

    def __init__(self, sites: Mapping[str, Site], roles: Mapping[str, str]) -> None:
        super().__init__(sites)
        self.roles = dict(roles)


class Rank1Functional(Derived, Rank1Layer):
    """A module that multiplies with parameters by itself."""

    prefix = "Rank1"

    rank1: FunctionalSites  # type: ignore[assignment]
    children_apart: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Watched(self):
            return super(Rank1Layer, self).forward(*args, **kwargs)  # type: ignore[misc]

    def weight_of(self, name: str) -> Tensor:
        return self.get_parameter(name.replace("/", "."))

    def bias_beside(self, name: str) -> Tensor | None:
        return None  # what is added to the product, if anything, is the module's own business

    def with_draw(self, name: str, row: int) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.rank1[name], AdditiveSite):
            path = name.replace("/", ".")
            raise ConversionError(f"what is added around the product with {path} has no bias to go to.")
        return super().with_draw(name, row)

    def folded(self, name: str, s: Tensor | None, r: Tensor | None) -> Tensor:
        weight, roles = self.weight_of(name), self.rank1.roles[name]
        for vector, kept in ((s, "gc"), (r, "gf")):
            if vector is not None:
                shape = [size if role in kept else 1 for size, role in zip(weight.shape, roles, strict=True)]
                weight = weight * vector.to(weight.dtype).view(shape)
        return weight


def functional_sizes(module: nn.Module, roles: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """{path of a parameter: (input channels, output channels)} for the roles of the dimensions of each."""

    def count(path: str, kept: str) -> int:
        shape = module.get_parameter(path.replace("/", ".")).shape
        return math.prod(size for size, role in zip(shape, roles[path], strict=True) if role in kept)

    return {path: (count(path, "gc"), count(path, "gf")) for path in roles}


def attach_functional(module: nn.Module, sites: Mapping[str, Site], roles: Mapping[str, str]) -> None:
    """Turn a module into one that puts factors around the products with its parameters, in place."""
    replace_class(module, derived_class(Rank1Functional, type(module)), FunctionalSites(sites, roles))


@contextmanager
def watched_products(module: nn.Module, sites: Mapping[str, Site], roles: Mapping[str, str]) -> Iterator[None]:
    """The same for a while, and for a module that may have become one already: its own sites are put aside."""
    own = module.rank1 if isinstance(module, Rank1Functional) else None
    if isinstance(module, Rank1Functional):
        module.rank1 = FunctionalSites(sites, roles)
    else:
        attach_functional(module, sites, roles)
    try:
        yield
    finally:
        if own is not None:
            module.rank1 = own
        else:
            detach(module)  # type: ignore[arg-type]


class Indices:
    """For every element of a weight, or of a view of it: its index in s and in r."""

    def __init__(self, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs, self.outputs = inputs, outputs

    @classmethod
    def of(cls, weight: Tensor, roles: str) -> Indices:
        def index(kept: str) -> Tensor:
            sizes = [size if role in kept else 1 for size, role in zip(weight.shape, roles, strict=True)]
            return torch.arange(math.prod(sizes), device=weight.device).view(sizes).expand(weight.shape)

        return cls(index("gc"), index("gf"))

    def map(self, function: Callable[[Tensor], Any]) -> list[Indices]:
        """The indices of each tensor that a view operation makes."""
        inputs, outputs = function(self.inputs), function(self.outputs)
        if isinstance(inputs, Tensor):
            return [Indices(inputs, outputs)]
        return [Indices(i, o) for i, o in zip(inputs, outputs, strict=True)]


class _Watched(TorchFunctionMode):
    """While a module's forward runs: puts factors around the products with its parameters."""

    def __init__(self, layer: Rank1Functional) -> None:
        super().__init__()
        self.pieces = Pieces()
        self.known: Known[tuple[Site, Indices]] = Known()
        for name, site in layer.rank1.items():
            weight = layer.weight_of(name)
            self.known.add(weight, (site, Indices.of(weight, layer.rank1.roles[name])))  # type: ignore[arg-type]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values, name = (*args, *kwargs.values()), name_of(func)
        if all(self.known.of(value) is None for value in values):
            result = func(*args, **kwargs)
            self.pieces.follow(name, values, result)
            return result
        ordered = arguments_of(name, args, kwargs)
        if ordered is not None:
            operation = operation_of(name, ordered, self._weight_dim)
            if operation is not None:
                x = ordered[operation.x]
                with taken(self.pieces.tokens(x)):
                    result = self._apply(func, args, kwargs, ordered, operation)
                self.pieces.follow(name, (x,), result)
                return result
        result = func(*args, **kwargs)
        if name in VIEWS | SAME:
            self._follow(func, args, kwargs, result, rearranged=name in VIEWS)
        return result

    def _weight_dim(self, value: Any) -> int | None:
        return None if self.known.of(value) is None else value.dim()

    def _follow(self, func: Any, args: Any, kwargs: Any, result: Any, rearranged: bool) -> None:
        """Remember the results of a view as parts of the weight."""
        site, indices = cast("tuple[Site, Indices]", self.known.of(args[0]))
        results = [result] if isinstance(result, Tensor) else list(result)
        parts = indices.map(lambda index: func(index, *args[1:], **kwargs)) if rearranged else [indices]
        for tensor, part in zip(results, parts, strict=True):
            self.known.add(tensor, (site, part))

    def _apply(self, func: Any, args: Any, kwargs: Any, arguments: list[Any], operation: Operation) -> Tensor:
        x, weight = arguments[operation.x], arguments[operation.weight]
        site, indices = cast("tuple[Site, Indices]", self.known.of(weight))
        site.note(x)
        lx, lw, ly = operation.labels
        lx = letters(lx, x.dim())
        batch = lx[site.batch_dim]
        if batch in lw:  # as with x @ W of experts side by side, or W @ x
            batch = next((label for label in lx if label not in lw), batch)
        if site.s is not None:
            s = _values(site.s.value(), indices.inputs, lw, lx, batch, x)
            for dim, label in enumerate(lx):
                if label in lw and label not in ly:
                    check_channels(x, dim, s.shape[dim])
            args, kwargs = with_argument(name_of(func), args, kwargs, operation.x, site.enter(x, s))
        y = func(*args, **kwargs)
        if site.r is None:
            return y
        ly = letters(ly, y.dim())
        bias = None if operation.bias is None else arguments[operation.bias]
        if bias is not None and "U" in lx:  # a convolution's bias belongs to its second dimension
            bias = bias.view(-1, *[1] * (y.dim() - 2))
        return site.releave(y, _values(site.r.value(), indices.outputs, lw, ly, batch, y), bias)


def _values(draw: Tensor, index: Tensor, weight: str, labels: str, batch: str, like: Tensor) -> Tensor:
    """The elements of a draw [R, d] that belong to a view of the weight, shaped to combine with `like`."""
    if batch not in labels:
        raise BayesifyError("a product with a parameter loses the batch; leave its module out with exclude=.")
    kept = "".join(label for label in weight if label in labels)
    for position, label in reversed(list(enumerate(weight))):
        if label not in kept:
            index = index.select(position, 0)
    rows = repeat_rows(draw, like.shape[labels.index(batch)])
    values = rows.index_select(1, index.reshape(-1)).view(len(rows), *index.shape)
    return arranged(values.to(like.dtype), kept, labels, batch)


@torch.compiler.assume_constant_result
def name_of(func: Any) -> str:
    """`matmul` for torch.matmul, the method and the operator; `T` for the property."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name.strip("_")
