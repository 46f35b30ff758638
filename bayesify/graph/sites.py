"""Find the sites of a model: a plan that accounts for every weight, made without changing anything."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bayesify.config import Rank1Config
from bayesify.errors import ConversionError
from bayesify.graph.capture import capture, is_tensor_input, is_untraced, linear_uses
from bayesify.graph.export import export_uses
from bayesify.graph.inputs import Inputs, derive_inputs
from bayesify.graph.layout import CONSTANT, known_dims, may_be_elsewhere, observe
from bayesify.graph.plan import Plan, join, site_name
from bayesify.graph.source import forward_names, layers_read
from bayesify.graph.stages import chosen_from
from bayesify.graph.uses import Uses
from bayesify.layers import FUSED, Gathering, Unfused, hands_tokens_on, is_exact, is_linear, rank1_class


def find_sites(model: nn.Module, config: Rank1Config, inputs: Inputs | None = None) -> Plan:
    """Plan the conversion of a model.

    Raises:
        ConversionError: no layer can be converted, or `sites` or a pattern matches nothing.
    """
    chosen = chosen_from(model, config.sites)
    plan = Plan()
    _collect_layers(model, plan, config)
    if config.member_batch_norm:
        plan.norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    before = dict.fromkeys([*plan.layers, *plan.norms])
    _read_graphs(model, plan, inputs)
    candidates = [*(before | dict.fromkeys(plan.sites()))]
    _check_linear(plan)
    _apply_patterns(plan, config, candidates, chosen)
    _settle_attention(model, plan)
    _settle_replaced(model, plan)
    _settle_surroundings(model, plan)
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


# ------------------------------------------------------------------------------------------------ passes


def _collect_layers(model: nn.Module, plan: Plan, config: Rank1Config) -> None:
    """Every layer with a rank-1 equivalent; what lies inside one is a part of it."""
    converted: list[str] = []
    for name, module in model.named_modules():
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ConversionError(
                f"{name or 'the model'} has parameters without a shape yet; run one forward pass first."
            )
        outer = next((layer for layer in converted if name.startswith(join(layer, ""))), None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and not (
            config.embeddings and isinstance(module, nn.Embedding)
        ):
            plan.skipped[name] = "an embedding looks rows up; embeddings=True gives its outputs factors"
            continue
        equivalent = rank1_class(type(module))
        if equivalent is not None:
            if outer is not None:
                plan.skipped[name] = f"part of the layer {outer or type(model).__name__}"
                continue
            plan.layers[name] = module
            if not equivalent.children_apart:
                converted.append(name)


def _read_graphs(model: nn.Module, plan: Plan, inputs: Inputs | None) -> None:
    """Weights used without their layer, and layers whose input does not carry the batch."""
    untraced: list[str] = []
    suspicious = False
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found = Uses(model, plan)
    for name, module in model.named_modules():
        if not _has_code_of_its_own(name, module, plan):
            continue
        graph = capture(module)
        parameter_of = _parameter_of(name, parameters)
        uses, constant_calls = ([], []) if graph is None else linear_uses(graph.nodes, parameter_of, is_tensor_input)
        plan.routes[name] = "fx"
        if graph is None or any(is_untraced(use.node) for use in uses):
            plan.routes[name] = "swap"
            untraced.append(name)
            suspicious = suspicious or _may_read_weights(module)
            continue
        if uses:
            found.note_calls(name, graph)
        for use in uses:
            found.add(name, use, parameter_of)
        called = [join(name, str(call.target)) for call in constant_calls]
        _skip_constant(plan, [layer for layer in plan.layers if any(matches(layer, path) for path in called)])
    if untraced:
        _read_untraced(model, plan, found, untraced, suspicious, inputs)
    found.settle()
    plan.layers |= {name: model.get_submodule(name) for name in plan.functional}


def _read_untraced(
    model: nn.Module, plan: Plan, found: Uses, untraced: list[str], suspicious: bool, inputs: Inputs | None
) -> None:
    """What Python tracing does not get through: look at the exported model."""
    if inputs is None and suspicious:
        inputs = derive_inputs(model)
    exported = export_uses(model, inputs) if inputs is not None else None
    if exported is not None:
        for name in untraced:
            plan.routes[name] = "export"
        # The queries, keys and values of attention have the same rows: where one has the batch, so have the others.
        varying = {
            o for o, use in exported.uses if use.carries_batch and isinstance(plan.layers.get(o), nn.MultiheadAttention)
        }
        for owner, use in exported.uses:
            if use.carries_batch:
                found.add(owner, use, exported.parameter_of)
            elif owner not in varying:
                _skip_constant(plan, [name for name in plan.layers if owner == name or owner.startswith(f"{name}.")])
    elif suspicious:
        plan.notes.append(
            f"the forward of {untraced[0] or type(model).__name__} could not be traced or exported, so its layers were "
            "swapped without a plan; pass example_inputs= to have it exported and the result checked on them"
        )
    if exported is None:
        for name in untraced:
            _account_unseen(model.get_submodule(name), name, plan)


def _account_unseen(module: nn.Module, name: str, plan: Plan) -> None:
    """Matrices of a module nobody could look into, and layers whose weights its code reads by itself."""
    for parameter, value in module.named_parameters(prefix=name, recurse=False):
        if value.dim() > 1:
            plan.skipped.setdefault(parameter, "raw parameter of a forward that cannot be traced; use unknown")
    names = {id(layer): layer_name for layer_name, layer in plan.layers.items()}
    beneath = {path: layer for path, layer in module.named_modules(remove_duplicate=False) if id(layer) in names}
    for path in layers_read(module, beneath):
        reason = f"may be read in {name or 'the model'}, which could be neither traced nor exported"
        plan.skip(names[id(beneath[path])], reason)


def _skip_constant(plan: Plan, layers: list[str]) -> None:
    for name in layers:
        plan.skip(name, CONSTANT)


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


def _apply_patterns(plan: Plan, config: Rank1Config, candidates: list[str], chosen: Callable[[str], bool]) -> None:
    for pattern in (*config.include, *config.exclude, *config.new_layers):
        if not any(matches(name, pattern) for name in candidates):
            near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.0)
            raise ConversionError(
                f"the pattern {pattern!r} matches no layer. Nearest names: {', '.join(near) or 'none'}. "
                "Patterns are full dotted names (a name selects everything beneath it) or globs such as 'layer4.*'."
            )
    for name in list(plan.layers):
        for weight in list(plan.functional.get(name, ["weight"])):
            reason = _left_out(site_name(name, weight), config, chosen)
            if reason is not None:
                plan.drop(name, weight, reason)
    for name in list(plan.norms):
        if _left_out(name, config, chosen) is not None:
            del plan.norms[name]


def _left_out(name: str, config: Rank1Config, chosen: Callable[[str], bool]) -> str | None:
    """Why the user does not want this site, if so."""
    if not chosen(name):
        return f"not selected by sites={config.sites!r}"
    if config.include and not any(matches(name, pattern) for pattern in config.include):
        return "not selected by include"
    pattern = next((p for p in config.exclude if matches(name, p)), None)
    return None if pattern is None else f"excluded by {pattern!r}"


def _settle_attention(model: nn.Module, plan: Plan) -> None:
    """Attention that is not converted reads the weight of its out projection."""
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and name not in plan.layers:
            plan.skip(join(name, "out_proj"), "nn.MultiheadAttention reads this weight without calling the layer")
            for own, parameter in module.named_parameters(prefix=name, recurse=False):
                if parameter.dim() > 1 and rank1_class(type(module)) is None:
                    plan.skipped[own] = f"{type(module).__name__} has a forward of its own, with attention in it"


def _settle_replaced(model: nn.Module, plan: Plan) -> None:
    """Layers whose code is not that of their class, or whose weights somebody else reads."""
    for name, module in model.named_modules():
        if name in plan.layers and "forward" in vars(module):
            for weight in list(plan.functional.get(name, ["weight"])):
                plan.drop(name, weight, "its forward was replaced on the object itself, as hooks of accelerate do")
        if len(getattr(module, "lora_magnitude_vector", ())):
            plan.skip(join(name, "base_layer"), "DoRA takes the norm of its weight")


def _settle_surroundings(model: nn.Module, plan: Plan) -> None:
    """Modules that must be taken care of for the sake of what is converted inside them."""
    for name, module in model.named_modules():
        gathering = hands_tokens_on(type(module)) and name not in plan.layers
        family = Unfused if isinstance(module, FUSED) else Gathering if gathering else None
        if family is not None and any(layer.startswith(join(name, "")) for layer in plan.layers):
            plan.wrapped[name] = (module, family)


def _find_batch(model: nn.Module, plan: Plan, inputs: Inputs | None) -> None:
    """Which dimension of each layer's input carries the batch; without inputs, the first call tells."""
    found, given = known_dims(model), inputs is not None
    lookups = [name for name, layer in plan.layers.items() if isinstance(layer, nn.Embedding)]
    if lookups and inputs is None:
        inputs = derive_inputs(model)
    observed = None
    if inputs is not None:
        observed = observe(model, inputs, plan.layers, plan.functional, values=given)
    if observed is not None:
        found = observed.dims | found
        plan.leave_out({name: CONSTANT for name in lookups if name not in found} | observed.without)
    plan.unsettled = observed is None and may_be_elsewhere(plan.layers, plan.functional)
    plan.batch_dims = {name: found[name] for name in plan.sites() if found.get(name)}


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
        name = join(prefix, str(node.target))
        return name if node.op == "get_attr" and name in parameters else None

    return name_of
