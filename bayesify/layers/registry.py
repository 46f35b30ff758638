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
from bayesify.layers.site import Site

T = TypeVar("T", bound="type[Rank1Layer]")

_TABLE: dict[str, type[Rank1Layer]] = {}


class Rank1Layer(nn.Module):
    """Base of every rank-1 layer: y = r ∘ L(s ∘ x) + (1 − r) ∘ b around the layer's own forward.

    The identity holds for any linear operator L(x) = W x + b whatever its code does to W (weight standardization,
    padding, low-bit storage), so a subclass of a known layer needs nothing of its own.
    """

    rank1: nn.ModuleDict
    channel_dim: ClassVar[int] = -1

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


def rank1(base: type[nn.Module] | str) -> Callable[[T], T]:
    """Register the rank-1 equivalent of a layer class (or of its full name, where importing it would be costly)."""

    def register(equivalent: T) -> T:
        _TABLE[base if isinstance(base, str) else _full_name(base)] = equivalent
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
        own: dict[str, Any] = {"__module__": __name__}
        if cls.forward is not getattr(ancestor, "forward", None) or not issubclass(equivalent, ancestor):
            own["forward"] = equivalent.own_forward()
        return type(f"Rank1{cls.__name__}", (equivalent, cls), own)
    return None


def is_exact(cls: type[nn.Module]) -> bool:
    """Whether the class itself, not only an ancestor, is registered."""
    return _full_name(cls) in _TABLE


def attach(layer: nn.Module, sites: dict[str, Site]) -> None:
    """Turn a layer into its rank-1 equivalent, in place. The caller has checked that there is one."""
    equivalent = rank1_class(type(layer))
    if equivalent is None:
        raise ConversionError(f"{type(layer).__name__} has no rank-1 equivalent; register one with @rank1.")
    if hasattr(layer, "rank1"):
        raise ConversionError("the layer already has an attribute named rank1, where its factors would go.")
    factors = nn.ModuleDict(sites).train(layer.training)
    layer.add_module("rank1", factors)
    try:
        layer.__class__ = equivalent
    except TypeError:
        del layer.rank1
        raise


def detach(layer: Rank1Layer) -> None:
    """Turn a rank-1 layer back into the layer it was, in place."""
    layer.__class__ = original_class(type(layer))  # type: ignore[assignment]
    del layer.rank1


def original_class(cls: type[Rank1Layer]) -> type[nn.Module]:
    """The class that a rank-1 class stands for."""
    return next(base for base in cls.__mro__ if not issubclass(base, Rank1Layer) and issubclass(base, nn.Module))


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
