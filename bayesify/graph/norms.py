"""Find the batch norms that see the output of one layer and nothing else, and so can become a part of it."""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from bayesify.graph.capture import capture
from bayesify.graph.plan import join

_LEAVES = (_BatchNorm, _ConvNd, nn.Linear, nn.ModuleList, nn.ModuleDict)
"""Modules whose forward, if they have one, calls no layer with a norm after it."""


def norm_pairs(model: nn.Module, *, checked: bool) -> list[tuple[str, str]]:
    """(layer, batch norm) names of pairs in which the layer's only use is the norm, whose only input is the layer.

    Every forward is captured by itself, in the mode it is in. A pair is found in its owner's: both are called there,
    nowhere else, and nobody reads their parameters or parts.

    Args:
        checked: whether the result is tried on inputs. Otherwise those are left out that inputs might show to be none:
            pairs inside of a module whose forward could not be captured, and which might reach past its children; and
            dense layers, whose outputs are not in the norm's dimension if there are positions.
    """
    modules = dict(model.named_modules())
    if not any(isinstance(module, _BatchNorm) for module in modules.values()):
        return []
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    used: Counter[str] = Counter()
    found: list[tuple[str, str]] = []
    unseen: list[str] = []
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
                source = node.all_input_nodes[0]
                if source.op == "call_module" and len(source.users) == 1:
                    found.append((join(owner, str(source.target)), join(owner, str(node.target))))

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

    return [
        (layer, norm)
        for layer, norm in found
        if alone(layer) and alone(norm) and (checked or sure(layer)) and _fit(modules[layer], modules[norm])
    ]


def _fit(layer: nn.Module, norm: nn.Module) -> bool:
    """A linear layer with one weight, and a batch norm that uses running statistics over its outputs."""
    if not isinstance(layer, (_ConvNd, nn.Linear)) or not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return False
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return outputs == norm.num_features
