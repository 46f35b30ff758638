"""Factors side by side: the same numbers and gradients as one after the other."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from bayesify import Rank1Config
from bayesify.distributions import POSTERIORS, NormalFactor, alike, hold_parts, kl_divergence, make_factor, side_by_side

SIZES = (3, 5, 2)


def factors(**options: object) -> list:
    torch.manual_seed(0)
    config = Rank1Config(members=2, init="normal", **options)  # type: ignore[arg-type]
    return [make_factor(config, size, torch.device("cpu")) for size in SIZES]


@pytest.mark.parametrize(
    ("options", "joined"),
    [
        ({}, True),
        ({"posterior": "deterministic"}, True),
        ({"posterior": "log-normal", "prior": "log-normal"}, True),
        ({"posterior": "cauchy", "prior": "cauchy"}, True),
        ({"posterior": "half-cauchy", "prior": "uniform"}, True),
        ({"posterior": "mixture-of-deltas"}, True),
        ({"prior": "tied-mean"}, True),
        ({"posterior": "normal-shared-std"}, False),
        ({"posterior": "normal-fixed-std"}, False),
        ({"prior": "empirical-bayes"}, False),
        ({"prior": "trainable-std"}, False),
    ],
    ids=str,
)
def test_draws_kl_and_gradients(options: dict[str, object], joined: bool) -> None:
    parts = factors(**options)
    groups = side_by_side(alike(parts))
    assert len(groups) == (1 if joined else len(parts))
    assert [part for _, each in groups for part in each] == parts
    parameters = [parameter for part in parts for parameter in part.parameters(recurse=False)]

    def outcome(draws: list[torch.Tensor], kl: torch.Tensor) -> list[torch.Tensor]:
        value = sum(((draw * (1 + i)).sum() for i, draw in enumerate(draws)), kl.sum())
        grads = torch.autograd.grad(value, parameters, allow_unused=True)
        return [value, *(torch.zeros(()) if grad is None else grad for grad in grads)]

    noise = [torch.rand(2, 4, size) for size in SIZES]
    apart = [part.transform(n, slice(None)).flatten(0, 1) for part, n in zip(parts, noise, strict=True)]
    expected = outcome(apart, torch.stack([_kl(part) for part in parts]).sum(0))
    for factor, each in groups:
        mine = torch.cat([n for part, n in zip(parts, noise, strict=True) if part in each], -1)
        hold_parts(each, factor.transform(mine, slice(None)).flatten(0, 1))
    found = outcome([part.value() for part in parts], torch.stack([_kl(factor) for factor, _ in groups]).sum(0))
    torch.testing.assert_close(found, expected)


def _kl(factor) -> torch.Tensor:
    torch.manual_seed(1)
    return kl_divergence(factor)


def test_the_least_size_of_all_draws_is_looked_for_once_and_not_copied() -> None:
    parts = factors()
    draws = torch.randn(6, sum(SIZES))
    hold_parts(parts, draws)
    least = parts[0].least
    assert least is not None
    assert all(part.least is least for part in parts)
    assert least() == draws.abs().min()
    draws.zero_()
    assert least() > 0
    assert copy.deepcopy(parts[0]).least is None
    parts[0].hold(None)
    assert parts[0].least is None
    hold_parts(parts, draws[:0])
    assert parts[0].least() == math.inf, "a batch may be empty"


def test_what_differs_stays_apart() -> None:
    class Own(NormalFactor):
        family = "normal"

    one, two = factors()[:2]
    other = factors(prior_scale=0.5)[0]
    own = Own(torch.ones(2, 4), 0.1, one.prior)
    groups = side_by_side(alike([one, other, two, own]))
    assert [each for _, each in groups] == [[one, two], [other], [own]]
    assert groups[1][0] is other
    assert type(own) not in POSTERIORS.values()
    assert list(groups[0][0].state_dict()) == list(one.state_dict()), "a view of the parts, in the order of one"
    assert not any(p.is_leaf for p in groups[0][0].parameters(recurse=False))
