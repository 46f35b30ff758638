"""Find the norms that a layer beside them can take over: what is between the two is used by nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bayesify.graph.capture import capture
from bayesify.graph.plan import join

_LEAVES = (_BatchNorm, _ConvNd, nn.LayerNorm, nn.Linear, nn.ModuleList, nn.ModuleDict)
"""Modules whose forward, if they have one, calls no layer with a norm beside it."""
Pair = tuple[str, str]


@dataclass(frozen=True)
class NormPairs:
    """Names of layers and norms that are neighbors.

    Attributes:
        after: (layer, batch norm): the layer's only use is the norm, whose only input is the layer.
        before: (layer norm, dense layer), the same the other way around.
    """

    after: list[Pair] = field(default_factory=list)
    before: list[Pair] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.after or self.before)


def norm_pairs(model: nn.Module, *, checked: bool) -> NormPairs:
    """All pairs of a network.

    Every forward is captured by itself, in the mode it is in. A pair is found in its owner's, or in those of modules
    that do nothing else with their input than to hand it on: both are called there, nowhere else, and nobody reads
    their parameters or parts.

    Args:
        checked: whether the result is tried on inputs. Otherwise those are left out that inputs might show to be none:
            pairs inside of a module whose forward could not be captured, and which might reach past its children; and
            dense layers, whose outputs are not in a batch norm's dimension if there are positions.
    """
    modules = dict(model.named_modules())
    if not any(isinstance(module, (_BatchNorm, nn.LayerNorm)) for module in modules.values()):
        return NormPairs()
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    used: Counter[str] = Counter()
    found: list[Pair] = []
    unseen: list[str] = []
    hands_on: dict[str, str] = {}
    for owner, module in modules.items():
        if isinstance(module, _LEAVES) or ".rank1." in f".{owner}." or next(module.children(), None) is None:
            continue
        graph = capture(module)
        if graph is None:
            unseen.append(owner)
            continue
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                used[join(owner, str(node.target))] += 1
            if node.op == "call_module" and len(node.all_input_nodes) == len(node.args) == 1 and not node.kwargs:
                source, name = node.all_input_nodes[0], join(owner, str(node.target))
                if len(source.users) == 1 and source.op == "call_module":
                    found.append((join(owner, str(source.target)), name))
                elif len(source.users) == 1 and source.op == "placeholder":
                    hands_on[owner] = name

    def alone(name: str) -> bool:
        module = modules.get(name)
        if module is None or used[name] != 1 or names[id(module)] != 1:
            return False
        hooked = any((module._forward_hooks, module._forward_pre_hooks))
        return not hooked and not any(other.startswith(f"{name}.") for other in used)

    def sure(name: str) -> bool:
        return isinstance(modules[name], _ConvNd) and not any(
            name.startswith(f"{owner}." if owner else "") for owner in unseen
        )

    after = [
        (a, b) for a, b in found if alone(a) and alone(b) and (checked or sure(a)) and _fit(modules[a], modules[b])
    ]
    before = []
    for norm, name in found if checked else ():
        passed = [name]
        while passed[-1] in hands_on:
            passed.append(hands_on[passed[-1]])
        once = all(used[p] == 1 and p in modules and names[id(modules[p])] == 1 for p in passed)
        if once and alone(norm) and alone(passed[-1]) and _scales(modules[norm], modules[passed[-1]]):
            before.append((norm, passed[-1]))
    return NormPairs(after, before)


def _fit(layer: nn.Module, norm: nn.Module) -> bool:
    """A linear layer with one weight, and a batch norm that uses running statistics over its outputs."""
    if not isinstance(layer, (_ConvNd, nn.Linear)) or not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return False
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return outputs == norm.num_features


def _scales(norm: nn.Module, layer: nn.Module) -> bool:
    """A layer norm over the inputs of a dense layer that multiplies them by a vector of its own."""
    return (
        isinstance(norm, nn.LayerNorm)
        and isinstance(norm.weight, nn.Parameter)
        and isinstance(layer, nn.Linear)
        and tuple(norm.normalized_shape) == (layer.in_features,)
    )
