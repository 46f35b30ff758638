"""Find the sites of a model: a plan that accounts for every weight, made without changing anything."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bayesify.config import Rank1Config
from bayesify.errors import ConversionError
from bayesify.graph.capture import capture, forward_names, linear_uses
from bayesify.graph.export import ExportedUse, export_uses
from bayesify.graph.inputs import Inputs, derive_inputs
from bayesify.graph.layout import known_dims, may_move_batch, observed_dims
from bayesify.layers import FUSED, is_exact, is_linear, rank1_class, weight_sizes

_NOT_LINEAR: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Embedding, nn.EmbeddingBag), "an embedding looks rows up; it is no linear map of an activation"),
    ((nn.Bilinear,), "a bilinear map of two inputs has no rank-1 equivalent here"),
)


@dataclass
class Plan:
    """Layers to convert, batch norms to split by member, everything else with its reason, and how it is known.

    `batch_dims` has the layers whose inputs carry the batch elsewhere than in their first dimension (`unsettled`: this
    is still to be seen on inputs); `fused` the layers of torch.nn whose fused kernel would go past what is converted in
    them.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, _BatchNorm] = field(default_factory=dict)
    fused: dict[str, nn.Module] = field(default_factory=dict)
    batch_dims: dict[str, int] = field(default_factory=dict)
    unsettled: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def skip(self, name: str, reason: str) -> None:
        self.layers.pop(name, None)
        self.skipped.setdefault(name, reason)

    def restrict(self, layers: Mapping[str, int]) -> None:
        """Keep the given layers {name: dimension of their inputs that carries the batch}."""
        if unknown := sorted(layers.keys() - self.layers.keys()):
            reason = self.skipped.get(unknown[0], "there is no such layer")
            raise ConversionError(f"layer {unknown[0]!r} should carry factors, but cannot: {reason}.")
        for name in self.layers.keys() - layers.keys():
            self.skip(name, "left out when the model was first converted")
        self.batch_dims = {name: dim for name, dim in layers.items() if dim}
        self.unsettled = False

    def sites(self) -> dict[str, tuple[str, tuple[int, int]]]:
        """{site name: (kind, (input channels, output channels))}."""
        found: dict[str, tuple[str, tuple[int, int]]] = {}
        for name, layer in self.layers.items():
            for weight, size in weight_sizes(layer).items():
                found[site_name(name, weight)] = (type(layer).__name__, size)
        return found


def site_name(layer: str, weight: str) -> str:
    """The layer's name where it has one weight, otherwise the weight's full name."""
    return layer if weight == "weight" else f"{layer}.{weight}" if layer else weight


def find_sites(model: nn.Module, config: Rank1Config, inputs: Inputs | None = None) -> Plan:
    """Plan the conversion of a model.

    Raises:
        ConversionError: no layer can be converted, or a pattern of `include` / `exclude` matches nothing.
    """
    plan = Plan()
    _collect_layers(model, plan)
    if config.member_batch_norm:
        plan.norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    candidates = [*plan.layers, *plan.norms]
    _read_graphs(model, plan, inputs)
    _check_linear(plan)
    _apply_patterns(plan, config, candidates)
    _settle_attention(model, plan)
    if not plan.layers:
        kinds = sorted(
            {type(m).__name__ for m in model.modules() if next(m.parameters(recurse=False), None) is not None}
        )
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:5])
        raise ConversionError(
            f"found no layer to convert in {type(model).__name__}. Modules with parameters: "
            + f"{', '.join(kinds) or 'none'}. "
            + (f"Skipped: {reasons}. " if reasons else "")
            + "Expected linear, convolutional or recurrent layers; register your own with @rank1."
        )
    _find_batch(model, plan, inputs)
    return plan


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """{parameter name: the other names of the same parameter}, for parameters that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {n: [o for o in group if o != n] for group in names.values() if len(group) > 1 for n in group}


# ------------------------------------------------------------------------------------------------ passes


def _collect_layers(model: nn.Module, plan: Plan) -> None:
    """Every layer with a rank-1 equivalent; what lies inside one is a part of it."""
    converted: list[str] = []
    for name, module in model.named_modules():
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ConversionError(
                f"{name or 'the model'} has parameters without a shape yet; run one forward pass first."
            )
        outer = next((layer for layer in converted if name.startswith(_join(layer, ""))), None)
        equivalent = rank1_class(type(module))
        if equivalent is not None:
            if outer is not None:
                plan.skipped[name] = f"part of the layer {outer or type(model).__name__}"
                continue
            plan.layers[name] = module
            if not equivalent.children_apart:
                converted.append(name)
            continue
        reason = next((text for kinds, text in _NOT_LINEAR if isinstance(module, kinds)), None)
        if reason is not None:
            plan.skipped[name] = reason


def _read_graphs(model: nn.Module, plan: Plan, inputs: Inputs | None) -> None:
    """Weights used without their layer, and layers whose input does not carry the batch."""
    untraced: list[str] = []
    suspicious = False
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = tied_names(model)
    for name, module in model.named_modules():
        if not _has_code_of_its_own(name, module, plan):
            continue
        graph = capture(module)
        plan.routes[name] = "swap" if graph is None else "fx"
        if graph is None:
            untraced.append(name)
            suspicious = suspicious or _may_read_weights(module)
            continue
        uses, constant_calls = linear_uses(
            graph.nodes, _parameter_of(name, parameters), lambda node: node.op == "placeholder"
        )
        for use in uses:
            _note_use(plan, use.parameters, name, use.operation, ties)
        for call in constant_calls:
            _skip_constant(plan, _join(name, str(call.target)))
    if not untraced:
        return
    if inputs is None and suspicious:
        inputs = derive_inputs(model)
    exported = export_uses(model, inputs) if inputs is not None else None
    if exported is not None:
        for name in untraced:
            plan.routes[name] = "export"
        _read_export(plan, exported, ties)
    elif suspicious:
        plan.notes.append(
            f"the forward of {untraced[0] or type(model).__name__} could not be traced or exported, so its layers were "
            "swapped without a plan; pass example_inputs= to have the result checked on them"
        )
    _account_for_raw_parameters(model, plan, untraced, planned=exported is not None)


def _read_export(plan: Plan, uses: list[ExportedUse], ties: dict[str, list[str]]) -> None:
    for use in uses:
        if not use.carries_batch:
            _skip_constant(plan, use.owner)
            continue
        _note_use(plan, use.parameters, use.owner, use.operation, ties)


def _note_use(plan: Plan, parameters: Iterable[str], owner: str, operation: str, ties: dict[str, list[str]]) -> None:
    """A linear operation run by `owner` reads these parameters: fine inside their own layer, else not covered."""
    for parameter in parameters:
        # A graph knows a tied weight by one of its names, which may be that of another layer.
        layers = [_layer_of(plan, name) for name in (parameter, *ties.get(parameter, []))]
        if any(name is not None and (owner == name or owner.startswith(f"{name}.")) for name in layers):
            continue
        layer = layers[0]
        where = owner or "the model"
        if layer is not None:
            plan.skip(layer, f"{where} uses its weight through {operation} without calling the layer")
        else:
            plan.skipped.setdefault(parameter, f"raw parameter, used through {operation} in {where}")


def _account_for_raw_parameters(model: nn.Module, plan: Plan, untraced: list[str], planned: bool) -> None:
    """Matrices owned by a module nobody could look into."""
    if planned:
        return
    for name in untraced:
        for parameter, value in model.get_submodule(name).named_parameters(prefix=name, recurse=False):
            if value.dim() > 1:
                plan.skipped.setdefault(parameter, "raw parameter of a forward that cannot be traced; use unknown")


def _skip_constant(plan: Plan, owner: str) -> None:
    for name in list(plan.layers):
        if name == owner or name.startswith(f"{owner}."):
            plan.skip(name, "its input does not carry the batch: it is the same for every example")


def _check_linear(plan: Plan) -> None:
    """A subclass with a forward of its own must be linear in its input, or scaling it means something else."""
    for name, layer in list(plan.layers.items()):
        equivalent = rank1_class(type(layer))
        if equivalent is None or is_exact(type(layer)) or "forward" not in vars(equivalent):
            continue
        try:
            linear = is_linear(layer, equivalent)
        except Exception as error:
            plan.skip(name, f"its own forward failed on a random input ({type(error).__name__}: {error})")
            continue
        if not linear:
            plan.skip(name, f"{type(layer).__name__} is not linear in its input plus its bias")


def _apply_patterns(plan: Plan, config: Rank1Config, candidates: list[str]) -> None:
    for pattern in (*config.include, *config.exclude):
        if not any(matches(name, pattern) for name in candidates):
            near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.0)
            raise ConversionError(
                f"the pattern {pattern!r} matches no layer. Nearest names: {', '.join(near) or 'none'}. "
                "Patterns are full dotted names (a name selects everything beneath it) or globs such as 'layer4.*'."
            )
    for name in list(plan.layers):
        if config.include and not any(matches(name, pattern) for pattern in config.include):
            plan.skip(name, "not selected by include")
    for name in list(plan.layers):
        pattern = next((p for p in config.exclude if matches(name, p)), None)
        if pattern is not None:
            plan.skip(name, f"excluded by {pattern!r}")
    for name in list(plan.norms):
        included = not config.include or any(matches(name, pattern) for pattern in config.include)
        if not included or any(matches(name, pattern) for pattern in config.exclude):
            del plan.norms[name]


def _settle_attention(model: nn.Module, plan: Plan) -> None:
    """Attention that is not converted reads the weight of its out projection; fused kernels read many."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and name not in plan.layers:
            plan.skip(_join(name, "out_proj"), "nn.MultiheadAttention reads this weight without calling the layer")
            for own, parameter in module.named_parameters(prefix=name, recurse=False):
                if parameter.dim() > 1 and rank1_class(type(module)) is None:
                    plan.skipped[own] = f"{type(module).__name__} has a forward of its own, with attention in it"
        elif isinstance(module, FUSED) and any(layer.startswith(_join(name, "")) for layer in plan.layers):
            plan.fused[name] = module


def _find_batch(model: nn.Module, plan: Plan, inputs: Inputs | None) -> None:
    """Which dimension of each layer's input carries the batch, where it may not be the first."""
    found = known_dims(model)
    moves = may_move_batch(model)
    if inputs is None and moves:
        inputs = derive_inputs(model)
    if inputs is not None:
        found = (observed_dims(model, inputs, plan.layers) or {}) | found
    plan.unsettled = moves and inputs is None
    plan.batch_dims = {name: found[name] for name in plan.layers if found.get(name)}


def matches(name: str, pattern: str) -> bool:
    """Whether a full dotted name is the pattern, lies beneath it, or fits it as a glob."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)


# ------------------------------------------------------------------------------------------------ helpers


def _has_code_of_its_own(name: str, module: nn.Module, plan: Plan) -> bool:
    """Modules worth a look: no converted layer, nothing inside one, no plain container, no leaf of torch.nn."""
    if (
        name in plan.layers
        or name in plan.skipped
        or isinstance(module, (nn.MultiheadAttention, *FUSED, nn.ModuleList, nn.ModuleDict))
    ):
        return False
    if any(name.startswith(f"{layer}.") for layer in plan.layers if layer) or "" in plan.layers:
        return False
    parts_of_torch = type(module).__module__.startswith("torch.nn.modules")
    return not (parts_of_torch and next(module.children(), None) is None)


def _may_read_weights(module: nn.Module) -> bool:
    """Whether a forward that cannot be traced could use a matrix, its own or a child's, without calling a layer."""
    if any(p.dim() > 1 for p in module.parameters(recurse=False)):
        return True
    weights = {n.rpartition(".")[2] for n, p in module.named_parameters() if p.dim() > 1}
    return bool(weights & forward_names(module))


def _parameter_of(prefix: str, parameters: set[str]) -> Callable[[fx.Node], str | None]:
    def name_of(node: fx.Node) -> str | None:
        name = _join(prefix, str(node.target))
        return name if node.op == "get_attr" and name in parameters else None

    return name_of


def _layer_of(plan: Plan, parameter: str) -> str | None:
    return next((n for n in plan.layers if parameter.startswith(_join(n, ""))), None)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
