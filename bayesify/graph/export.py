"""Plan from `torch.export` where Python tracing fails: one graph of the whole model, whose nodes name their owners."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from bayesify.graph.capture import ParameterOf, Use, linear_uses
from bayesify.graph.inputs import Inputs
from bayesify.graph.shapes import quiet
from bayesify.modes import evaluating


@dataclass(frozen=True)
class Exported:
    """Every linear operation of a model by the module whose forward ran it, and the parameters of its nodes."""

    uses: list[tuple[str, Use]]
    parameter_of: ParameterOf


def export_uses(model: nn.Module, inputs: Inputs) -> Exported | None:
    """The linear operations of the model on the given inputs, or `None` where it cannot be exported."""
    args, kwargs = inputs
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]), quiet():
            kwargs = {**kwargs, **_no_cache(model)}
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception:
        # Whatever stops export, the plain swap remains right; the caller notes that it was not planned.
        return None
    parameters = program.graph_signature.inputs_to_parameters
    user_inputs = set(program.graph_signature.user_inputs)

    def parameter_of(node: fx.Node) -> str | None:
        return parameters.get(str(node.target)) if node.op == "placeholder" else None

    uses, _ = linear_uses(
        _inlined(program.graph_module).nodes,
        parameter_of,
        lambda node: node.op == "placeholder" and node.target in user_inputs,
    )
    return Exported([(_owner(use.node), use) for use in uses], parameter_of)


def _inlined(module: fx.GraphModule) -> fx.Graph:
    """The graph of a module, with the graphs of its regions without gradients or with a precision of their own in
    place."""
    flat = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        region = _region(node, module)
        source = values.get(node.args[0]) if node.target is operator.getitem else None
        if isinstance(source, (tuple, list)):
            values[node] = source[node.args[1]]
        elif region is not None:
            inner, arguments = region
            graph = _inlined(inner)
            places = [n for n in graph.nodes if n.op == "placeholder"]
            given = zip(places, fx.map_arg(arguments, values.__getitem__), strict=True)
            values[node] = flat.graph_copy(graph, dict(given))
        elif node.op != "output":
            values[node] = flat.node_copy(node, values.__getitem__)
        else:
            flat.output(fx.map_arg(node.args[0], values.__getitem__))
    return flat


def _region(node: fx.Node, module: fx.GraphModule) -> tuple[fx.GraphModule, list[Any]] | None:
    """The inner graph of such a region, and what it is given."""
    if not str(node.target).startswith("wrap_with_"):
        return None
    for place, argument in enumerate(node.args):
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            return getattr(module, str(argument.target)), list(node.args[place + 1 :])
    return None


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.partition("@")[0]


def _no_cache(model: nn.Module) -> dict[str, bool]:
    config = getattr(model, "config", None)
    return {"use_cache": False} if getattr(config, "use_cache", None) else {}
