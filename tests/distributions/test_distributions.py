"""Posteriors, priors, their KL, and the config that chooses them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from bayesify import ConfigError, FormatError, Rank1Config, bayesify
from bayesify.distributions import (
    CLIP,
    DeterministicFactor,
    NormalFactor,
    NormalPrior,
    Prior,
    kl_divergence,
    make_factor,
)
from bayesify.distributions.posteriors import SCALE_FLOOR, inverse_softplus


def factor(loc: Any, scale: float = 0.1, prior: Prior | None = None) -> NormalFactor:
    return NormalFactor(torch.as_tensor(loc, dtype=torch.float32), scale, prior or NormalPrior(1.0, 0.1))


# ------------------------------------------------------------------------------------------------ KL


@pytest.mark.parametrize("scale", [1e-4, 0.03, 0.1, 2.0])
@pytest.mark.parametrize("prior", [(1.0, 0.1), (0.0, 1.0), (-2.0, 0.05)], ids=str)
def test_normal_kl_equals_torch(scale: float, prior: tuple[float, float]) -> None:
    q = factor(1 + 0.5 * torch.randn(3, 7), scale, NormalPrior(*prior))
    normal = torch.distributions.Normal(q.loc.double(), q.scale.double())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(*prior)).sum(-1)
    torch.testing.assert_close(kl_divergence(q).double(), expected, rtol=1e-5, atol=1e-6)


def test_normal_kl_by_hand() -> None:
    """Two members of two elements under N(1, 0.1²): 0 where they agree, 200 nats more for a flipped sign."""
    q = factor([[1.0, 1.0], [1.0, -1.0]], 0.1)
    assert kl_divergence(q).tolist() == pytest.approx([0.0, 4.0 / (2 * 0.01)], abs=1e-3)
    narrow = factor([[1.0]], 0.05)
    by_hand = math.log(0.1 / 0.05) + 0.05**2 / (2 * 0.1**2) - 0.5
    assert kl_divergence(narrow).item() == pytest.approx(by_hand, rel=1e-5)


def test_published_costs_of_signs() -> None:
    """At N(±1, 0.0316²) the paper's prior N(1, 0.1²) charges 0.70 nats for +1 and 200.7 for −1."""
    q = factor([[1.0], [-1.0]], math.sqrt(1e-3 / 0.999))
    assert kl_divergence(q).tolist() == pytest.approx([0.702, 200.702], abs=2e-3)


def test_normal_kl_agrees_with_monte_carlo() -> None:
    q = factor([[1.2, 0.7, 1.0]], 0.2, NormalPrior(0.9, 0.3))
    noise = torch.randn(1, 200_000, 3)
    with torch.no_grad():
        draws = q.transform(noise, slice(None))[0]
        own = torch.distributions.Normal(q.loc[0], q.scale[0]).log_prob(draws)
        prior = torch.distributions.Normal(0.9, 0.3).log_prob(draws)
        estimate = float((own - prior).sum(-1).mean())
    assert kl_divergence(q).item() == pytest.approx(estimate, rel=0.02)


def test_kl_gradient_pulls_to_the_prior() -> None:
    q = factor([[1.3, 0.8]], 0.05, NormalPrior(1.0, 0.1))
    kl_divergence(q).sum().backward()
    expected = (q.loc.detach() - 1.0) / 0.1**2
    torch.testing.assert_close(q.loc.grad, expected)
    assert bool((q.rho.grad < 0).all()), "a narrow posterior widens"


def test_deterministic_kl_is_zero_for_each_member() -> None:
    q = DeterministicFactor(torch.randn(3, 4), 0.0, NormalPrior(1.0, 0.1))
    assert kl_divergence(q).tolist() == [0.0, 0.0, 0.0]


def test_pair_without_a_formula_names_the_known_ones() -> None:
    class Flat(Prior):
        family = "flat"

    with pytest.raises(ConfigError, match=r"no KL of a normal posterior to a flat prior; it has one to: .*log-uniform"):
        kl_divergence(factor([[1.0]], prior=Flat()))


# ------------------------------------------------------------------------------------------------ spread


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.03164),
        ({"dropout_rate": 1e-3}, 0.03164),
        ({"dropout_rate": 1e-6}, 0.001),
        ({"dropout_rate": 0.5}, 1.0),
        ({"dropout_rate": 0.0}, 0.0),
        ({"posterior_scale": 0.25}, 0.25),
    ],
    ids=str,
)
def test_initial_spread(options: dict[str, float], expected: float) -> None:
    config = Rank1Config(**options)
    assert config.spread == pytest.approx(expected, abs=5e-6)
    made = make_factor(config, 5, torch.device("cpu"))
    assert made.scale.flatten().tolist() == pytest.approx([expected] * 20, rel=1e-3, abs=2e-7)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 0.0316, 1.0, 20.0, 300.0])
def test_softplus_round_trip(scale: float) -> None:
    rho = torch.tensor(inverse_softplus(scale))
    assert float(nn.functional.softplus(rho) + SCALE_FLOOR) == pytest.approx(scale, rel=1e-3)


def test_published_rho() -> None:
    assert inverse_softplus(math.sqrt(1e-3 / 0.999)) == pytest.approx(-3.4375, abs=1e-3)
    assert inverse_softplus(math.sqrt(1e-6 / 0.999999)) == pytest.approx(-6.907, abs=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-9, SCALE_FLOOR, 1e4])
def test_extreme_scales_give_finite_gradients(scale: float) -> None:
    q = factor(torch.ones(2, 3), scale)
    draw = q.transform(torch.randn(2, 4, 3), slice(None))
    (draw.square().sum() + kl_divergence(q).sum()).backward()
    assert torch.isfinite(draw).all()
    for parameter in (q.loc, q.rho):
        assert torch.isfinite(parameter).all()
        assert torch.isfinite(parameter.grad).all()


# ------------------------------------------------------------------------------------------------ draws


def test_draws_are_reparameterized() -> None:
    q = factor([[1.0, 2.0], [3.0, 4.0]], 0.5)
    noise = torch.randn(2, 6, 2)
    draw = q.transform(noise, slice(None))
    torch.testing.assert_close(draw, q.loc[:, None] + 0.5 * noise, rtol=1e-5, atol=1e-6)
    draw[1].sum().backward()
    torch.testing.assert_close(q.loc.grad, torch.tensor([[0.0, 0.0], [6.0, 6.0]]))
    slope = torch.sigmoid(q.rho.detach()[1])  # d softplus / d rho
    torch.testing.assert_close(q.rho.grad[1], noise[1].sum(0) * slope)
    part = q.transform(noise[1:], slice(1, 2))
    assert torch.equal(part[0], draw[1])


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["above", "below"])
def test_draws_are_clipped_without_a_gradient(sign: float) -> None:
    q = factor([[sign * 9.0, 1.0]], 1.0)
    draw = q.transform(torch.tensor([[[sign * 3.0, 0.5]]]), slice(None))
    torch.testing.assert_close(draw, torch.tensor([[[sign * CLIP, 1.5]]]))
    draw.sum().backward()
    assert q.loc.grad.tolist() == [[0.0, 1.0]]
    assert float(q.rho.grad[0, 0]) == 0.0


def test_means_beyond_the_clip_are_clipped_in_the_forward_pass() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    bnn = bayesify(model, members=2, posterior="deterministic", factors="inputs")
    with torch.no_grad():
        next(iter(bnn.factors()))[2].loc.copy_(torch.tensor([[50.0], [-50.0]]))
    for samples in (None, 1):
        assert bnn.predict(torch.ones(1, 1), samples=samples).outputs.flatten().tolist() == [10.0, -10.0]
    assert bnn.merge(0).weight.item() == 10.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_draws_are_float32_under_low_precision(dtype: torch.dtype) -> None:
    q = factor(torch.full((2, 8), 1.0), 1e-3).to(dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([q.noise(5, generator) for _ in range(2)])
    draw = q.transform(noise, slice(None))
    assert noise.dtype == draw.dtype == torch.float32
    assert q.mean.dtype == torch.float32
    assert kl_divergence(q).dtype == torch.float32
    # A spread of 0.001 around 1 vanishes in 16 bits, but not in a float32 draw.
    assert (draw - 1).std().item() == pytest.approx(1e-3, rel=0.25)


def test_start_of_the_locations() -> None:
    cpu = torch.device("cpu")
    ones = make_factor(Rank1Config(init="ones", members=3), 4, cpu)
    assert torch.equal(ones.loc, torch.ones(3, 4))
    torch.manual_seed(1)
    drawn = make_factor(Rank1Config(init="normal", init_scale=0.25, members=4), 5000, cpu).loc
    assert drawn.mean().item() == pytest.approx(1.0, abs=0.01)
    assert drawn.std(1).tolist() == pytest.approx([0.25] * 4, rel=0.05)
    assert float(torch.corrcoef(drawn.detach()).fill_diagonal_(0).abs().max()) < 0.06, "members are independent"
    torch.manual_seed(1)
    assert torch.equal(make_factor(Rank1Config(init_scale=0.25, members=4), 5000, cpu).loc, drawn)


@pytest.mark.parametrize("sites", [1, 4])
def test_more_sites_start_nearer_to_the_network(sites: int) -> None:
    torch.manual_seed(0)
    bnn = bayesify(nn.Sequential(*(nn.Linear(2000, 2000, device="cpu") for _ in range(sites))), members=2)
    for _, _, factor in bnn.factors():
        assert factor.loc.detach().std().item() == pytest.approx(min(0.5, 1.5 / sites), rel=0.05)
    assert bnn.config.non_defaults() == {"members": 2}


# ------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": 0}, "members must be a positive integer; found 0"),
        ({"members": 2.0}, "members must be a positive integer; found 2.0"),
        ({"members": True}, "members must be a positive integer"),
        ({"posterior": "gauss"}, "posterior='gauss' is unknown; expected one of 'deterministic', 'normal', .*'cauchy'"),
        ({"prior": "flat"}, "prior='flat' is unknown"),
        ({"init": "zeros"}, "init='zeros' is unknown"),
        ({"factors": "r"}, "factors='r' is unknown"),
        ({"noise": "batch"}, "noise='batch' is unknown"),
        ({"kl_reduction": "none"}, "kl_reduction='none' is unknown"),
        ({"prior_scale": 0.0}, "prior_scale must be positive; found 0.0"),
        ({"prior_scale": math.nan}, "prior_scale must be positive"),
        ({"prior_loc": math.inf}, "prior_loc must be finite"),
        ({"init_scale": -0.1}, "init_scale must be finite and not negative"),
        ({"posterior_scale": math.inf}, "posterior_scale must be finite and not negative"),
        ({"posterior_scale": "0.1"}, "posterior_scale must be finite and not negative; found '0.1'"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\); found 1.0"),
        ({"dropout_rate": 0.1, "posterior_scale": 0.1}, "give posterior_scale or dropout_rate, not both"),
        ({"include": (3,)}, "include must hold names or patterns"),
        ({"exclude": ("a", None)}, "exclude must hold names or patterns"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rank1Config(**options)


@pytest.mark.parametrize(
    "config",
    [
        Rank1Config(),
        Rank1Config(members=2, posterior="deterministic", init="ones"),
        Rank1Config(include="layer4", exclude=("head", "*.bn"), noise="member"),
        Rank1Config(posterior_scale=0.2, prior_loc=0.5, kl_reduction="sum", factors="inputs"),
    ],
    ids=["default", "ensemble", "patterns", "numbers"],
)
def test_config_round_trip_through_json(config: Rank1Config) -> None:
    written = json.loads(json.dumps(config.non_defaults()))
    assert Rank1Config.from_dict(written) == config
    assert len(written) == sum(getattr(config, n) != getattr(Rank1Config(), n) for n in vars(config))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"member": 2}, "there.json: unknown field 'member'; expected some of .*members"),
        ({"members": -1}, "there.json: members must be a positive integer"),
        ({"include": 3}, "there.json: "),
    ],
    ids=["unknown", "bad-value", "bad-type"],
)
def test_config_from_a_bad_file(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Rank1Config.from_dict(values, source="there.json")
