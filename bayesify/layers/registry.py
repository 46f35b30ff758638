"""Which layers have a rank-1 equivalent, and how a layer becomes one and back.

A rank-1 layer *is* the original layer: the same object with the same parameters under the same names, whose class
is replaced by a subclass that scales its inputs by s and its outputs by r. Users extend the table:

    @rank1(MyLinear)
    class Rank1MyLinear(Rank1Layer, MyLinear): ...
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bayesify.errors import ConversionError
from bayesify.layers.site import AdditiveSite, Site

T = TypeVar("T", bound="type[Rank1Layer]")

_TABLE: dict[str, type[Rank1Layer]] = {}
_PREDICATES: list[tuple[Callable[[type[nn.Module]], bool], type[Rank1Layer]]] = []


class Rewritten(nn.Module):
    """A layer of the original network whose class was replaced; what it got besides lies in `rank1`."""

    rank1: nn.Module


class Derived(Rewritten):
    """Base of families that make a class for each class of layer, when needed: see `derived_class`."""

    prefix: ClassVar[str]
    """Of the name of the class."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (type(self).__bases__[0], original_class(type(self))), self.__dict__


@cache
def derived_class(family: type[Derived], cls: type[nn.Module]) -> type[Derived]:
    """The class that a layer of class `cls` becomes."""
    return type(f"{family.prefix}{cls.__name__}", (family, cls), {"__module__": __name__})


def wrap(layer: nn.Module, family: type[Derived]) -> None:
    """Turn a layer into one of a family that adds nothing to its state, in place."""
    replace_class(layer, derived_class(family, type(layer)), nn.Module())


def _blank(family: type[Derived], cls: type[nn.Module]) -> Derived:
    """A layer for pickle to fill, which does not find classes by name that are made when needed."""
    derived = derived_class(family, cls)
    return derived.__new__(derived)


class Rank1Layer(Rewritten):
    """Base of every rank-1 layer: y = r ∘ L(s ∘ x) + (1 − r) ∘ b around the layer's own forward.

    The identity holds for any linear operator L(x) = W x + b whatever its code does to W (weight standardization,
    padding, low-bit storage), so a subclass of a known layer needs nothing of its own.
    """

    rank1: nn.ModuleDict  # type: ignore[assignment]
    channel_dim: ClassVar[int] = -1
    children_apart: ClassVar[bool] = False
    """Whether layers inside this one are called as they are, and so are sites of their own."""
    plain_forward_only: ClassVar[bool] = False
    """Whether a subclass with a forward of its own has no equivalent."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        site = self.site
        y = super().forward(site.scale_inputs(input, self.channel_dim), *args, **kwargs)  # type: ignore[misc]
        return site.rescale_outputs(y, self.bias, self.channel_dim)  # type: ignore[arg-type]

    @classmethod
    def own_forward(cls) -> Callable[..., Any]:
        """The forward for subclasses with code of their own; it ends in `super().forward`, theirs."""
        return Rank1Layer.forward

    @property
    def site(self) -> Site:
        """The site of a layer with a single weight."""
        return self.rank1["weight"]  # type: ignore[return-value]

    @classmethod
    def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
        """{weight name: (input channels, output channels)} of a layer, before or after it becomes rank-1."""
        raise NotImplementedError

    @classmethod
    def probe_input(cls, layer: Any) -> Tensor | None:
        """A small input [2, ...] on the layer's device, to check that an unknown subclass is linear."""
        return None

    def folded(self, name: str, s: Tensor | None, r: Tensor | None) -> Tensor:
        """W ∘ (r sᵀ) for vectors s [in], r [out], in the shape and dtype of the weight `name`."""
        raise NotImplementedError

    def applied(self, name: str, s: Tensor) -> Tensor:
        """W s [out] for s [in]: what adding s to every input adds to every output.

        Raises:
            ConversionError: it is not the same at every position.
        """
        raise ConversionError(
            f"what is added to the inputs of {original_class(type(self)).__name__} cannot be folded into its bias."
        )

    def weight_of(self, name: str) -> Tensor:
        """The weight of the site `name`."""
        return getattr(self, name)

    def bias_beside(self, name: str) -> Tensor | None:
        """The bias that is added to the outputs of the site `name`, as far as factors are concerned."""
        return getattr(self, bias_of(name), None)

    def with_draw(self, name: str, row: int) -> tuple[Tensor, Tensor | None]:
        """The weight `name` and its bias, with one row of the draw in force folded into them."""
        site: Site = self.rank1[name]  # type: ignore[assignment]
        s, r = site.vectors(row)
        terms = [self.bias_beside(name), site.own_bias_of(row)]
        weight = self.weight_of(name)
        if isinstance(site, AdditiveSite):
            terms += [None if s is None else self.applied(name, s.to(weight.dtype)), r]
        else:
            weight = self.folded(name, s, r)
        parts = [term.to(weight.dtype) for term in terms if term is not None]
        return weight, sum(parts[1:], parts[0]) if parts else None


def rank1(base: type[nn.Module] | str) -> Callable[[T], T]:
    """Register the rank-1 equivalent of a layer class (or of its full name, where importing it would be costly)."""

    def register(equivalent: T) -> T:
        _TABLE[base if isinstance(base, str) else _full_name(base)] = equivalent
        rank1_class.cache_clear()
        return equivalent

    return register


def rank1_where(predicate: Callable[[type[nn.Module]], bool]) -> Callable[[T], T]:
    """Register the rank-1 equivalent of all classes for which `predicate` holds, where no one class is their base."""

    def register(equivalent: T) -> T:
        _PREDICATES.append((predicate, equivalent))
        rank1_class.cache_clear()
        return equivalent

    return register


@cache
def rank1_class(cls: type[nn.Module]) -> type[Rank1Layer] | None:
    """The rank-1 equivalent of a layer class, or `None`.

    A registered type has an importable class. A subclass of one gets its class from here: its nearest registered
    ancestor says where the channels are, and its own forward runs between the two multiplications.
    """
    for ancestor in cls.__mro__:
        equivalent = _TABLE.get(_full_name(ancestor))
        if equivalent is None:
            continue
        if ancestor is cls and issubclass(equivalent, cls):
            return equivalent
        same_forward = cls.forward is getattr(ancestor, "forward", None)
        if equivalent.plain_forward_only and not same_forward:
            return None
        own: dict[str, Any] = {"__module__": __name__}
        if not same_forward or not issubclass(equivalent, ancestor):
            own["forward"] = equivalent.own_forward()
        return type(f"Rank1{cls.__name__}", (equivalent, cls), own)
    equivalent = next((equivalent for predicate, equivalent in _PREDICATES if predicate(cls)), None)
    return None if equivalent is None else type(f"Rank1{cls.__name__}", (equivalent, cls), {"__module__": __name__})


def weight_sizes(layer: nn.Module) -> dict[str, tuple[int, int]]:
    """{weight name: (input channels, output channels)} of a layer that has a rank-1 equivalent; {} of any other."""
    equivalent = rank1_class(type(layer))
    return {} if equivalent is None else equivalent.sizes(layer)


def is_exact(cls: type[nn.Module]) -> bool:
    """Whether the class itself, not only an ancestor, is registered."""
    return _full_name(cls) in _TABLE


def bias_of(weight: str) -> str:
    """The name of the bias beside a weight: bias, bias_hh_l0, down_proj_bias, …"""
    return weight.replace("weight", "bias") if "weight" in weight else f"{weight}_bias"


def attach(layer: nn.Module, sites: dict[str, Site]) -> None:
    """Turn a layer into its rank-1 equivalent, in place. The caller has checked that there is one."""
    equivalent = rank1_class(type(layer))
    if equivalent is None:
        raise ConversionError(f"{type(layer).__name__} has no rank-1 equivalent; register one with @rank1.")
    replace_class(layer, equivalent, nn.ModuleDict(sites))


def replace_class(layer: nn.Module, equivalent: type[Rewritten], added: nn.Module) -> None:
    """Make a layer an instance of `equivalent`, in place, with `added` as its `rank1`."""
    if hasattr(layer, "rank1"):
        raise ConversionError("the layer already has an attribute named rank1, where its factors would go.")
    layer.add_module("rank1", added.train(layer.training))
    try:
        layer.__class__ = equivalent
    except TypeError:
        del layer.rank1
        raise


def detach(layer: Rewritten) -> None:
    """Turn a rewritten layer back into the layer it was, in place."""
    layer.__class__ = original_class(type(layer))  # type: ignore[assignment]
    del layer.rank1


def original_class(cls: type[Rewritten]) -> type[nn.Module]:
    """The class that a rank-1 class stands for."""
    return next(base for base in cls.__mro__ if not issubclass(base, Rewritten) and issubclass(base, nn.Module))


@torch.no_grad()
def is_linear(layer: nn.Module, cls: type[Rank1Layer]) -> bool:
    """Whether L(x) − b is linear in x, tried on one random input; true where it cannot be tried."""
    x = cls.probe_input(layer)
    if x is None or x.device.type == "meta":
        return True
    training = layer.training
    state = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(x.shape).to(x)
        layer.eval()
        try:
            once, twice, zero = layer(x), layer(2 * x), layer(0 * x)
        finally:
            layer.train(training)
            for name, buffer in layer.named_buffers():
                buffer.copy_(state[name])
    bias = getattr(layer, "bias", None)
    offset = torch.zeros_like(zero)
    if bias is not None:
        shape = [1] * zero.dim()
        shape[cls.channel_dim] = -1
        offset = offset + bias.view(shape)
    tolerance = 0.02 * float(once.abs().max()) + 1e-6
    pairs = ((zero, offset), (twice - zero, 2 * (once - zero)))
    return all(torch.allclose(a, b, rtol=0.02, atol=tolerance) for a, b in pairs)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
