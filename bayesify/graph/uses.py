"""Weights that are used without calling their layer: sites of the module that uses them, where factors can go."""

from __future__ import annotations

from torch import fx, nn

from bayesify.graph.capture import ParameterOf, Use
from bayesify.graph.functional import UnsupportedError, roles_of
from bayesify.graph.plan import Plan, join, tied_names


class Uses:
    """The linear operations found in the graphs of a model, on their way into its plan."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.ties = tied_names(model)
        self.shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        first = {id(module): name for name, module in model.named_modules()}
        self.names = {n: first[id(m)] for n, m in model.named_modules(remove_duplicate=False)}
        self.callers: set[str] = set()
        self.found: dict[str, dict[str, str]] = {}
        """{parameter: {module that uses it: roles of its dimensions}}."""
        self.refused: dict[str, str] = {}
        """{parameter: reason}."""

    def note_calls(self, owner: str, graph: fx.Graph) -> None:
        """Note which layers the forward of `owner` calls."""
        self.callers |= {join(owner, str(node.target)) for node in graph.nodes if node.op == "call_module"}

    def add(self, owner: str, use: Use, parameter_of: ParameterOf) -> None:
        """Note an operation that the forward of `owner` runs, by any of its names."""
        owner = self.names.get(owner, owner)
        for weight, parameters in use.weights.items():
            for parameter in parameters:
                if use.node.op in ("call_module", "output"):
                    self._hand_on(owner, use, parameter)
                elif not self._of_the_layer_itself(parameter, owner):
                    self._add(owner, use, weight, parameter, parameter_of)

    def _hand_on(self, owner: str, use: Use, parameter: str) -> None:
        """Note that a child gets a parameter beside activations, as the query of an attention, or a caller gets it."""
        if len(self.shapes[parameter]) > 1:
            called = use.node.op == "call_module"
            where = f"given to {join(owner, use.operation)}" if called else f"returned by {owner or 'the model'}"
            self.found.setdefault(parameter, {})
            self.refused.setdefault(parameter, f"{where}, use unknown")

    def _of_the_layer_itself(self, parameter: str, owner: str) -> bool:
        """Whether a layer of the plan uses its own weight; a graph knows a tied weight by one of its names."""
        layers = [self.layer_of(name) for name in (parameter, *self.ties.get(parameter, []))]
        own = [name for name in layers if name is not None and (owner == name or owner.startswith(f"{name}."))]
        self.callers |= set(own)
        return bool(own)

    def _add(self, owner: str, use: Use, weight: fx.Node, parameter: str, parameter_of: ParameterOf) -> None:
        known = self.found.setdefault(parameter, {})
        where = f"used through {use.operation} in {owner or 'the model'}"
        try:
            if not use.carries_batch:
                raise UnsupportedError("which is the same for every example")
            if not parameter.startswith(join(owner, "")):
                raise UnsupportedError("which does not own it")
            roles = roles_of(use.node, weight, parameter_of, self.shapes)
            if known.setdefault(owner, roles) != roles:
                raise UnsupportedError("in several ways")
            if len(known) > 1:
                raise UnsupportedError("and in another module")
        except UnsupportedError as reason:
            self.refused.setdefault(parameter, f"{where}, {reason}")

    def settle(self) -> None:
        """Put what was found into the plan: as a site of the module that uses it, or skipped with the reason."""
        for parameter, owners in self.found.items():
            layer = self.layer_of(parameter)
            reason = self.refused.get(parameter)
            owner = next(iter(owners), None)
            if owner is not None and reason is None:
                left_out = self.plan.skipped.get(owner)
                reason = left_out or self._called_as_well(parameter, layer, owner)
            if reason is not None or owner is None:
                kind = "" if layer is not None else "raw parameter, "
                self.plan.skip(parameter if layer is None else layer, f"{kind}{reason}")
                continue
            if layer is not None:
                del self.plan.layers[layer]
            path = parameter.removeprefix(join(owner, "")).replace(".", "/")
            self.plan.functional.setdefault(owner, {})[path] = owners[owner]

    def _called_as_well(self, parameter: str, layer: str | None, owner: str) -> str | None:
        """Factors around the product would meet those of a layer that is called inside of the same forward."""
        for name in (parameter, *self.ties.get(parameter, [])):
            other = self.layer_of(name)
            if other is not None and other.startswith(join(owner, "")) and (other != layer or other in self.callers):
                return f"used in {owner or 'the model'} directly, and by the layer {other}"
        return None

    def layer_of(self, parameter: str) -> str | None:
        return next((n for n in self.plan.layers if parameter.startswith(join(n, ""))), None)
