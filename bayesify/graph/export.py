"""Plan from `torch.export` where Python tracing fails: one graph of the whole model, whose nodes name their owners."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import fx, nn

from bayesify.graph.capture import linear_uses
from bayesify.graph.inputs import Inputs
from bayesify.modes import evaluating


@dataclass(frozen=True)
class ExportedUse:
    """A linear operation: the parameters it reads, the module whose forward ran it, whether it sees the batch."""

    parameters: frozenset[str]
    owner: str
    operation: str
    carries_batch: bool


def export_uses(model: nn.Module, inputs: Inputs) -> list[ExportedUse] | None:
    """Every linear operation of the model on the given inputs, or `None` where it cannot be exported."""
    args, kwargs = inputs
    try:
        with evaluating(model), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            kwargs = {**kwargs, **_no_cache(model)}
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception:
        # Whatever stops export, the plain swap remains right; the caller notes that it was not planned.
        return None
    parameters = program.graph_signature.inputs_to_parameters
    user_inputs = set(program.graph_signature.user_inputs)
    uses, _ = linear_uses(
        program.graph.nodes,
        lambda node: parameters.get(node.name) if node.op == "placeholder" else None,
        lambda node: node.op == "placeholder" and node.name in user_inputs,
    )
    return [ExportedUse(use.parameters, _owner(use.node), use.operation, use.carries_batch) for use in uses]


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return path.partition("@")[0]


def _no_cache(model: nn.Module) -> dict[str, bool]:
    config = getattr(model, "config", None)
    return {"use_cache": False} if getattr(config, "use_cache", None) else {}
