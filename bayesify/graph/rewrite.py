"""Swap the planned layers for their rank-1 equivalents, all or none."""

from __future__ import annotations

from torch import nn

from bayesify.config import Rank1Config
from bayesify.distributions import Factor, make_factor
from bayesify.errors import ConversionError
from bayesify.graph.report import ConversionReport
from bayesify.graph.sites import Plan, tied_names
from bayesify.layers import Rank1Layer, Site, attach, detach, rank1_class


def swap(plan: Plan, config: Rank1Config) -> None:
    """Convert every layer of the plan in place; on any failure the model is as it was."""
    done: list[nn.Module] = []
    try:
        for name, layer in plan.layers.items():
            done.append(layer)
            _convert(name, layer, config)
    except BaseException:
        restore(done)
        raise


def _convert(name: str, layer: nn.Module, config: Rank1Config) -> None:
    try:
        attach(layer, _new_sites(layer, config))
    except Exception as error:
        raise ConversionError(
            f"layer {name!r} ({type(layer).__name__}) could not become rank-1: {type(error).__name__}: {error}. "
            f"Leave it out with exclude={name!r}, or register an equivalent with @rank1."
        ) from error


def restore(modules: list[nn.Module]) -> None:
    """Turn every rank-1 layer among the modules back into what it was."""
    for module in modules:
        if isinstance(module, Rank1Layer):
            detach(module)


def report_on(model: nn.Module, plan: Plan, config: Rank1Config) -> ConversionReport:
    """What converting by this plan does, computed from the plan alone."""
    sites = plan.sites()
    sides = {"both": (1, 1), "inputs": (1, 0), "outputs": (0, 1)}[config.factors]
    vectors = 1 if config.posterior == "deterministic" else 2
    added = sum(sides[0] * s + sides[1] * r for _, (s, r) in sites.values()) * config.members * vectors
    ties = tied_names(model)
    tied = {name: ties[weight] for name in sites for weight in (f"{name}.weight", name) if weight in ties}
    return ConversionReport(
        members=config.members,
        parameters=sum(p.numel() for p in model.parameters()),
        parameters_added=added,
        converted={name: kind for name, (kind, _) in sites.items()},
        skipped=dict(plan.skipped),
        sizes={name: size for name, (_, size) in sites.items()},
        tied=tied,
        routes=dict(plan.routes),
        notes=list(plan.notes),
    )


def _new_sites(layer: nn.Module, config: Rank1Config) -> dict[str, Site]:
    equivalent = rank1_class(type(layer))
    sizes = {} if equivalent is None else equivalent.sizes(layer)
    device = next(layer.parameters()).device

    def factor(side: str, size: int) -> Factor | None:
        return make_factor(config, size, device) if config.factors in ("both", side) else None

    return {name: Site(factor("inputs", s), factor("outputs", r)) for name, (s, r) in sizes.items()}
