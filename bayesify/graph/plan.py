"""The plan of a conversion: what becomes of every weight, made without changing anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayesify.errors import ConversionError
from bayesify.layers import Derived, functional_sizes, weight_sizes


@dataclass
class Plan:
    """Layers to convert, batch norms to split by member, everything else with its reason, and how it is known.

    `functional` has the modules that use parameters in their own code, which are among the `layers`, too: {module:
    {path of a parameter, with "/" for ".": roles of its dimensions}}. `batch_dims` has the sites whose inputs carry
    the batch elsewhere than in their first dimension (`unsettled`: this is still to be seen on inputs); `wrapped` the
    modules that must behave otherwise for the sake of what is converted in them, with what they become: layers of
    torch.nn whose fused kernel would go past it, and modules that hand single tokens to it.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    functional: dict[str, dict[str, str]] = field(default_factory=dict)
    norms: dict[str, _BatchNorm] = field(default_factory=dict)
    wrapped: dict[str, tuple[nn.Module, type[Derived]]] = field(default_factory=dict)
    batch_dims: dict[str, int] = field(default_factory=dict)
    unsettled: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def skip(self, name: str, reason: str) -> None:
        self.layers.pop(name, None)
        self.skipped.setdefault(name, reason)

    def drop(self, name: str, weight: str, reason: str) -> None:
        """Leave one site out, and with its last site its layer."""
        if name not in self.functional:
            self.skip(name, reason)
            return
        del self.functional[name][weight]
        self.skipped[site_name(name, weight)] = reason
        if not self.functional[name]:
            del self.functional[name], self.layers[name]

    def leave_out(self, sites: Mapping[str, str]) -> None:
        """Leave sites out, {name: reason}."""
        own = self._own()
        for site in sites:
            self.drop(*own[site], sites[site])

    def _own(self) -> dict[str, tuple[str, str]]:
        """{site name: (layer, weight)}."""
        return {site_name(name, weight): (name, weight) for name in self.layers for weight in self.sizes(name)}

    def restrict(self, sites: Mapping[str, int]) -> None:
        """Keep the given sites {name: dimension of their inputs that carries the batch}."""
        own = self._own()
        if unknown := sorted(sites.keys() - own.keys()):
            reason = self.skipped.get(unknown[0], "there is no such layer")
            raise ConversionError(f"{unknown[0]!r} should carry factors, but cannot: {reason}.")
        self.leave_out(dict.fromkeys(own.keys() - sites.keys(), "left out when the model was first converted"))
        self.batch_dims = {name: dim for name, dim in sites.items() if dim}
        self.unsettled = self.unsettled and not self.batch_dims

    def sites(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """{site name: (kind, (input channels, output channels))}."""
        found: dict[str, tuple[str, tuple[int, int]]] = {}
        for name, layer in self.layers.items():
            for weight, size in self.sizes(name).items():
                found[site_name(name, weight)] = (type(layer).__name__, size)
        return found

    def sizes(self, name: str) -> dict[str, tuple[int, int]]:
        """{weight: (input channels, output channels)} of a layer."""
        layer, functional = self.layers[name], self.functional.get(name)
        return weight_sizes(layer) if functional is None else functional_sizes(layer, functional)


def site_name(layer: str, weight: str) -> str:
    """The layer's name where it has one weight, otherwise the weight's full name (without an ending in .weight)."""
    return layer if weight == "weight" else join(layer, weight.replace("/", ".")).removesuffix(".weight")


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """{parameter name: the other names of the same parameter}, for parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {n: [o for o in group if o != n] for group in names.values() if len(group) > 1 for n in group}


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
