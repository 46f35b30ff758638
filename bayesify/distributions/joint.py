"""Many factors as one: what is done to each element is done to all of a network at once."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from bayesify.distributions.posteriors import POSTERIORS, Factor, LeastSize


def alike(factors: Iterable[Factor]) -> list[list[Factor]]:
    """Factors of one family with one prior together, for `side_by_side`.

    A factor that cannot be joined to others is by itself: one of a user's own family, or with something that its
    elements share.
    """
    groups: dict[object, list[Factor]] = {}
    for factor in factors:
        groups.setdefault(_kind(factor), []).append(factor)
    return list(groups.values())


def side_by_side(groups: Iterable[list[Factor]]) -> list[tuple[Factor, list[Factor]]]:
    """Factors that are alike joined to one of [K, Σ d] elements, beside those it is made of.

    A joined factor is computed from the parameters of its parts and passes gradients on to them; it has none itself.
    """
    return [(parts[0] if len(parts) == 1 else _joined(parts), parts) for parts in groups]


def hold_parts(parts: list[Factor], values: Tensor) -> None:
    """Give every part its share of values [R, Σ d]."""
    least = LeastSize(values)
    for factor, value in zip(parts, values.split([factor.size for factor in parts], -1), strict=True):
        factor.hold(value, least)


def _kind(factor: Factor) -> object:
    prior = factor.prior
    plain = type(factor) is POSTERIORS.get(factor.family) and prior.of_each_element
    own = list(factor.parameters(recurse=False))
    if not plain or any(p.dim() < 2 for p in own) or next(factor.buffers(), None) is not None:
        return id(factor)
    return (type(factor), own[0].device, own[0].dtype, type(prior), prior.loc, prior.scale)


def _joined(parts: list[Factor]) -> Factor:
    whole = copy.copy(parts[0])
    names = [name for name, _ in whole.named_parameters(recurse=False)]
    # Not parameters of anything: what their parts are, together, for as long as this factor is used.
    whole.__dict__["_parameters"] = {n: torch.cat([getattr(part, n) for part in parts], -1) for n in names}
    return whole
