"""Swap the planned layers for their rank-1 equivalents, all or none."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from bayesify.config import Rank1Config
from bayesify.distributions import Factor, make_factor
from bayesify.errors import ConversionError
from bayesify.graph.plan import Plan, join, site_name, tied_names
from bayesify.graph.report import ConversionReport
from bayesify.graph.sites import matches
from bayesify.layers import (
    AdditiveSite,
    MemberBatchNorm,
    MemberVector,
    Rank1Functional,
    Rank1Layer,
    Rewritten,
    Site,
    attach,
    attach_functional,
    attach_norm,
    bias_of,
    detach,
    wrap,
)


def swap(plan: Plan, config: Rank1Config) -> None:
    """Convert every layer of the plan in place; on any failure the model is as it was."""
    config = dataclasses.replace(config, init_scale=config.start_scale(len(plan.sites())))
    done: list[nn.Module] = []
    try:
        for name, layer in plan.layers.items():
            done.append(layer)
            _convert(name, layer, plan, config)
        for module, family in plan.wrapped.values():
            done.append(module)
            wrap(module, family)
        for norm in plan.norms.values():
            done.append(norm)
            attach_norm(norm, config.members)
    except BaseException:
        restore(done)
        raise


def _convert(name: str, layer: nn.Module, plan: Plan, config: Rank1Config) -> None:
    try:
        sites = _new_sites(name, plan, config, next(layer.parameters()).device)
        if name in plan.functional:
            attach_functional(layer, sites, plan.functional[name])
        else:
            attach(layer, sites)
    except Exception as error:
        raise ConversionError(
            f"layer {name!r} ({type(layer).__name__}) could not become rank-1: {type(error).__name__}: {error}. "
            f"Leave it out with exclude={name!r}, or register an equivalent with @rank1."
        ) from error


def take_out(layer: Rank1Layer, weight: str) -> None:
    """Take one site out of a converted layer, which with its last one becomes what it was."""
    del layer.rank1[weight]
    if isinstance(layer, Rank1Functional):
        del layer.rank1.roles[weight]
    if not layer.rank1:
        detach(layer)


def restore(modules: list[nn.Module]) -> None:
    """Turn every rewritten layer among the modules back into what it was."""
    for module in modules:
        if isinstance(module, MemberBatchNorm):
            module.share_statistics()
        if isinstance(module, Rewritten):
            detach(module)


def report_on(model: nn.Module, plan: Plan, config: Rank1Config) -> ConversionReport:
    """What converting by this plan does, computed from the plan alone."""
    sites = plan.sites()
    ties = tied_names(model)
    tied = {name: ties[weight] for name in sites for weight in (join(name, "weight"), name) if weight in ties}
    return ConversionReport(
        members=config.members,
        parameters=sum(p.numel() for p in model.parameters()),
        parameters_added=_count_added(plan, config),
        factors=config.factors,
        converted={name: kind for name, (kind, _) in sites.items()},
        skipped=dict(plan.skipped),
        sizes={name: size for name, (_, size) in sites.items()},
        tied=tied,
        routes=dict(plan.routes),
        batch_dims=dict(plan.batch_dims),
        unsettled=plan.unsettled,
        notes=[*plan.notes, *_norm_notes(plan, config)],
    )


def _norm_notes(plan: Plan, config: Rank1Config) -> list[str]:
    if not config.member_batch_norm:
        return []
    return [f"batch norm layers with scale, shift and statistics of each member's own: {len(plan.norms)}"]


def _count_added(plan: Plan, config: Rank1Config) -> int:
    """Parameters that the conversion adds, counted on the meta device."""
    meta = torch.device("meta")
    sites = [site for name in plan.layers for site in _new_sites(name, plan, config, meta).values()]
    added = sum(p.numel() for site in sites for p in site.parameters())
    affine = sum(p.numel() for norm in plan.norms.values() for p in norm.parameters(recurse=False))
    return added + config.members * affine


def _new_sites(name: str, plan: Plan, config: Rank1Config, device: torch.device) -> dict[str, Site]:
    def factor(side: str, size: int, signs: bool = False) -> Factor | None:
        return make_factor(config, size, device, signs) if size and config.factors in ("both", side) else None

    def own_bias(weight: str, size: int) -> MemberVector | None:
        has_bias = name not in plan.functional and getattr(plan.layers[name], bias_of(weight), None) is not None
        return MemberVector(config.members, size, device) if config.member_bias and has_bias else None

    site = Site if config.perturbation == "multiplicative" else AdditiveSite
    made = {}
    for weight, (s, r) in plan.sizes(name).items():
        own = site_name(name, weight)
        inputs = factor("inputs", s, signs=any(matches(own, pattern) for pattern in config.new_layers))
        made[weight] = site(inputs, factor("outputs", r), own_bias(weight, r), plan.batch_dims.get(own, 0))
    return made
