"""Draws, means and starts of every posterior family."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify import Rank1Config, bayesify
from bayesify.distributions import CLIP, POSTERIORS, PRIORS, Factor, NormalFactor, kl_divergence, make_factor
from bayesify.distributions.posteriors import MixtureOfDeltasFactor
from bayesify.distributions.priors import inverse_softplus
from bayesify.errors import ConfigError, ConversionError

CPU = torch.device("cpu")
RHO = -3.4375
"""rho of the published spread, a dropout rate of 0.001."""
JITTERED = ("normal", "log-normal")
WITH_RHO = [name for name in POSTERIORS if name not in ("deterministic", "normal-fixed-std", "mixture-of-deltas")]


def build(posterior: str, locs: Any, scale: float) -> Factor:
    """A factor with these locations; those of a log-normal posterior are given in log space."""
    init = torch.as_tensor(locs, dtype=torch.float32)
    return POSTERIORS[posterior](init.exp() if posterior == "log-normal" else init, scale, PRIORS["uniform"]())


def made(seed: int = 0, size: int = 500, **options: Any) -> Factor:
    torch.manual_seed(seed)
    return make_factor(Rank1Config(**{"prior": "uniform", **options}), size, CPU)


@torch.no_grad()
def sample(q: Factor, count: int, clipped: bool = False) -> Tensor:
    """[K, count, d] draws."""
    noise = torch.stack([q.noise(count, None) for _ in range(q.members)])
    return (q.transform if clipped else q.sample)(noise, slice(None))


# ------------------------------------------------------------------------------------------------ laws of the draws


def phi(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2.0))


CDF: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "normal": lambda f, loc, scale: phi((f - loc) / scale),
    "normal-shared-std": lambda f, loc, scale: phi((f - loc) / scale),
    "normal-fixed-std": lambda f, loc, scale: phi((f - loc) / scale),
    "log-normal": lambda f, loc, scale: phi((f.log() - loc) / scale),
    "cauchy": lambda f, loc, scale: 0.5 + torch.atan((f - loc) / scale) / math.pi,
    "half-cauchy": lambda f, loc, scale: 2 * torch.atan((f - loc) / scale) / math.pi,
}
LOCS = [[1.0, 0.3], [2.0, 5.0]]


def test_every_family_is_tested_here() -> None:
    """A new family needs a distribution function above, or a test of its own as these two have."""
    assert set(CDF) | {"deterministic", "mixture-of-deltas"} == set(POSTERIORS)


@pytest.mark.parametrize("scale", [0.0316, 2.0])
@pytest.mark.parametrize("posterior", CDF)
def test_draws_follow_their_distribution(posterior: str, scale: float) -> None:
    """Kolmogorov–Smirnov at the 0.1 % level, for each element and for all of them together."""
    critical = math.sqrt(math.log(2 / 0.001) / 2)  # 1.9495, asymptotic
    q = build(posterior, LOCS, scale)
    draws = sample(q, 50_000).double()
    loc, own = (value.detach().double()[:, None] for value in (q.loc, q.scale))
    levels = CDF[posterior](draws, loc, own).transpose(1, 2).flatten(0, 1)
    for level in (*levels, levels.flatten()):
        ordered, n = level.sort().values, len(level)
        steps = torch.arange(n + 1).double() / n
        distance = float(torch.maximum(ordered - steps[:-1], steps[1:] - ordered).max())
        assert distance < critical / math.sqrt(n)
    correlation = torch.corrcoef(levels).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 4 / math.sqrt(50_000), "members and elements are independent"


@pytest.mark.parametrize("posterior", CDF)
def test_draws_are_reparameterized(posterior: str) -> None:
    """The slope of a draw in each parameter is the difference quotient at the same noise."""
    q = build(posterior, LOCS, 0.4)
    noise = torch.stack([q.noise(3, None) for _ in range(2)]).clamp(-3, 3)
    for name, parameter in q.named_parameters():
        q.zero_grad()
        q.sample(noise, slice(None)).sum().backward()
        step = 1e-2
        values = []
        for sign in (-1, 1):
            shifted = copy.deepcopy(q)
            with torch.no_grad():
                shifted.get_parameter(name).add_(sign * step)
                values.append(float(shifted.sample(noise, slice(None)).double().sum()))
        slope = (values[1] - values[0]) / (2 * step)
        assert float(parameter.grad.sum()) == pytest.approx(slope, rel=2e-3, abs=2e-3), name


@pytest.mark.parametrize("posterior", [*CDF, "mixture-of-deltas"])
def test_mean_is_that_of_the_draws(posterior: str) -> None:
    """The median for Cauchy families, which have no mean. Within four standard errors."""
    q = build(posterior, LOCS, 0.5)
    count = 100_000
    draws = sample(q, count).double()
    if "cauchy" in posterior:
        # The density at the median is 1/(π scale) for both families, and the error of a median 1/(2 f √n).
        center, error = draws.median(1).values, math.pi * 0.5 / 2 / math.sqrt(count)
    else:
        center, error = draws.mean(1), draws.std(1) / math.sqrt(count)
    assert bool(((center - q.mean.detach()).abs() < 4 * error).all())
    torch.testing.assert_close(q.value(), q.mean.mean(0, keepdim=True))


def test_deterministic_draws_are_the_locations() -> None:
    q = build("deterministic", LOCS, 0.5)
    assert torch.equal(sample(q, 3), torch.tensor(LOCS)[:, None].expand(2, 3, 2))
    assert not q.random
    assert all(POSTERIORS[name].random for name in POSTERIORS if name != "deterministic")


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_draws_differ_between_examples_and_members(posterior: Any) -> None:
    bnn = bayesify(nn.Linear(3, 2), members=3, posterior=posterior, prior="uniform", init="ones", posterior_scale=0.3)
    outputs = bnn.predict(torch.ones(1, 3).expand(4, 3), samples=2, seed=1).outputs
    distinct = {tuple(row) for row in outputs.flatten(0, 2).tolist()}
    assert len(distinct) == (1 if posterior == "deterministic" else 3 * 2 * 4)


# ------------------------------------------------------------------------------------------------ Cauchy


def test_share_of_clipped_cauchy_draws() -> None:
    """P(|f| > 10) = 1 − [atan((10 − μ)/s) + atan((10 + μ)/s)] / π, of which each half lands on its own end."""
    count = 200_000
    for loc, scale in ((1.0, 0.0316), (0.0, 1.0), (-4.0, 3.0)):
        q = build("cauchy", [[loc]], scale)
        draws = sample(q, count, clipped=True)
        assert float(draws.abs().max()) == CLIP
        scale = float(q.scale.detach())
        for end in (-1, 1):
            exact = 0.5 - math.atan((CLIP - end * loc) / scale) / math.pi
            share = float((draws == end * CLIP).double().mean())
            assert share == pytest.approx(exact, abs=4 * math.sqrt(exact / count))


def test_published_share_of_clipped_draws() -> None:
    """Around 1, 0.2 % of the draws at spread 0.0316 and 0.006 % at spread 0.001."""
    for scale, expected in ((0.0316, 0.002), (0.001, 6.5e-5)):
        exact = 1 - (math.atan(9 / scale) + math.atan(11 / scale)) / math.pi
        assert exact == pytest.approx(expected, rel=0.1)
        share = float(
            (sample(build("cauchy", [[1.0] * 50], scale), 40_000, clipped=True).abs() == CLIP).double().mean()
        )
        assert share == pytest.approx(exact, rel=0.1 if scale > 0.01 else 0.4)


def test_clipped_cauchy_draws_pass_no_gradient() -> None:
    q = build("cauchy", [[0.0, 3.0]], 4.0)
    noise = q.noise(1000, None)[None]
    draws = q.transform(noise, slice(None))
    free = draws.detach().abs() < CLIP
    assert 50 < int((~free).sum()) < 1000
    draws.sum().backward()
    assert q.loc.grad.tolist() == free[0].sum(0, keepdim=True).tolist()
    slope = torch.sigmoid(q.get_parameter("rho").detach())
    torch.testing.assert_close(q.get_parameter("rho").grad, (noise * free)[0].sum(0, keepdim=True) * slope)


def test_half_cauchy_stays_above_its_location() -> None:
    q = build("half-cauchy", [[0.5, 1e-6, 3.0]], 0.1)
    draws = sample(q, 100_000)
    assert bool((draws >= q.loc.detach()).all())
    gap = (draws - q.loc.detach()).amin(1)
    assert bool((gap < 1e-4).all()), "and the draws come down to it"


def test_half_cauchy_location_survives_large_steps_down() -> None:
    q = build("half-cauchy", torch.rand(2, 3) + 0.5, 0.1)
    start = q.loc.detach().clone()
    optimizer = torch.optim.SGD(q.parameters(), lr=10.0)
    for _ in range(200):
        optimizer.zero_grad()
        (100.0 * q.transform(torch.full((2, 1, 3), 0.5), slice(None))).sum().backward()
        optimizer.step()
    assert bool((q.loc < 1e-3 * start).all())
    assert bool((q.loc > 0).all())
    assert bool((q.scale > 0).all())
    assert bool((sample(q, 100) > 0).all())
    assert torch.isfinite(kl_divergence(q)).all()


# ------------------------------------------------------------------------------------------------ normals


def test_shared_std_is_one_number() -> None:
    """Its gradient is the sum of those that every element would have for a spread of its own."""
    locs = torch.randn(3, 4)
    shared, own = build("normal-shared-std", locs, 0.7), build("normal", locs, 0.7)
    assert shared.get_parameter("rho").shape == ()
    noise = torch.randn(3, 5, 4)
    for q in (shared, own):
        (q.transform(noise, slice(None)).pow(2).sum() + kl_divergence(q).sum()).backward()
    assert own.get_parameter("rho").grad.unique().numel() == 12
    torch.testing.assert_close(shared.get_parameter("rho").grad, own.get_parameter("rho").grad.sum())
    torch.testing.assert_close(shared.loc.grad, own.loc.grad)
    with torch.no_grad():
        shared.get_parameter("rho").fill_(inverse_softplus(0.2))
    torch.testing.assert_close(shared.scale, torch.full((3, 4), 0.2))
    part = shared.sample(noise[1:2], slice(1, 2))
    assert torch.equal(part[0], shared.sample(noise, slice(None))[1])


def test_fixed_std_is_not_trained_but_saved() -> None:
    q = build("normal-fixed-std", torch.randn(2, 3), 0.25)
    assert [name for name, _ in q.named_parameters()] == ["loc"]
    assert set(q.state_dict()) == {"loc", "std"}
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    other = build("normal-fixed-std", torch.zeros(2, 3), 3.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.scale.tolist() == [[0.25] * 3] * 2
    noise = torch.randn(2, 4, 3)
    assert torch.equal(other.transform(noise, slice(None)), q.transform(noise, slice(None)))


def test_fixed_std_stays_through_training() -> None:
    bnn = bayesify(nn.Linear(3, 2), posterior="normal-fixed-std", dropout_rate=0.2)
    optimizer = torch.optim.SGD(bnn.parameters(), lr=0.1)
    bnn.train()
    (bnn(torch.randn(8, 3)).square().mean() + bnn.kl()).backward()
    before = [q.loc.detach().clone() for _, _, q in bnn.factors()]
    optimizer.step()
    for (_, _, q), loc in zip(bnn.factors(), before, strict=True):
        assert not torch.equal(q.loc, loc)
        torch.testing.assert_close(q.scale, torch.full_like(loc, 0.5))


# ------------------------------------------------------------------------------------------------ mixture of deltas


def points_of(q: Factor) -> nn.Parameter:
    return q.get_parameter("points")


def test_points_are_equally_likely() -> None:
    """χ² of the counts below its 0.1 % point at 4 degrees of freedom, for every element; draws are points exactly."""
    q = build("mixture-of-deltas", LOCS, 0.5)
    points, count = points_of(q).detach(), 50_000
    draws = sample(q, count)
    assert points.shape == (5, 2, 2)
    counts = (draws[None] == points[:, :, None]).sum(2).double()
    assert counts.sum(0).tolist() == [[count] * 2] * 2
    chi_squared = ((counts - count / 5).square() / (count / 5)).sum(0)
    assert float(chi_squared.max()) < 18.47
    torch.testing.assert_close(q.loc, points.mean(0))
    torch.testing.assert_close(q.scale, points.std(0, unbiased=False))


def test_gradient_reaches_only_the_points_picked() -> None:
    q = build("mixture-of-deltas", [[1.0, 2.0], [3.0, 4.0]], 0.5)
    noise = torch.tensor([[[0.05, 0.999999]], [[0.5, 0.2]]])  # points 0 and 4; 2 and 1
    draws = q.transform(noise, slice(None))
    points = points_of(q).detach()
    picked = [[points[0, 0, 0], points[4, 0, 1]], [points[2, 1, 0], points[1, 1, 1]]]
    assert torch.equal(draws[:, 0], torch.tensor(picked))
    (draws * torch.tensor([[[1.0, 10.0]], [[100.0, 1000.0]]])).sum().backward()
    expected = torch.zeros(5, 2, 2)
    expected[0, 0, 0], expected[4, 0, 1], expected[2, 1, 0], expected[1, 1, 1] = 1.0, 10.0, 100.0, 1000.0
    assert torch.equal(points_of(q).grad, expected)
    part = q.transform(noise[1:], slice(1, 2))
    assert torch.equal(part[0], draws[1])


def test_points_start_around_the_location() -> None:
    q = made(posterior="mixture-of-deltas", init="ones", posterior_scale=0.2, members=3, size=4000)
    assert isinstance(q, MixtureOfDeltasFactor)
    points = q.points.detach()
    torch.testing.assert_close(q.mean.detach(), torch.ones(3, 4000))
    assert points.flatten(1).std(1).tolist() == pytest.approx([0.2] * 5, rel=0.03)
    assert float(q.scale.detach().square().mean().sqrt()) == pytest.approx(0.2, rel=0.02)
    correlation = torch.corrcoef(points.transpose(0, 1).flatten(0, 1))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        between = correlation[5 * first : 5 * first + 5, 5 * second : 5 * second + 5]
        assert float(between.abs().max()) < 0.08, "members are independent"


# ------------------------------------------------------------------------------------------------ the start


def test_log_normal_starts_at_one() -> None:
    """Published code put the sign init in log space, so that the median of the draws was e or 1/e."""
    q = made(posterior="log-normal", init="ones", posterior_scale=0.3)
    assert torch.equal(q.loc.detach(), torch.zeros(4, 500))
    assert sample(q, 200).median().item() == pytest.approx(1.0, abs=0.003)
    drawn = made(posterior="log-normal", init="normal", init_scale=0.25, posterior_scale=0.3, size=5000)
    assert float(drawn.loc.detach().std()) == pytest.approx(0.25, rel=0.03)
    assert sample(drawn, 10).median().item() == pytest.approx(1.0, abs=0.02)
    assert not bool((made(posterior="log-normal", init_scale=0.1, size=5000).mean > math.e / 1.2).any())


@pytest.mark.parametrize("posterior", ["log-normal", "half-cauchy"])
def test_positive_families_start_where_the_draws_are(posterior: Any) -> None:
    """Their locations are exp(N(0, init_scale²)) on the scale of the draws, with one seed the same for both."""
    q = made(3, posterior=posterior, init_scale=0.4, posterior_scale=1e-3)
    torch.manual_seed(3)
    expected = torch.normal(0.0, 0.4, (4, 500)).exp()
    start = q.loc.exp() if posterior == "log-normal" else q.mean  # medians
    torch.testing.assert_close(start.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_members_at_their_means_reproduce_the_network(posterior: Any) -> None:
    """With init="ones": exactly where the mean is the location, and within the spread of what stands in for it."""
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(5, 6)
    expected = network(x).detach()
    bnn = bayesify(network, members=2, posterior=posterior, prior="uniform", init="ones", posterior_scale=0.01)
    found = bnn.predict(x).outputs
    assert found.shape == (2, 1, 5, 3)
    off = {"log-normal": 1e-3}.get(posterior, 2e-6)  # its mean is exp(s²/2) = 1 + 5e-5
    assert float((found[:, 0] - expected).abs().max()) < off


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 0.75, 1.0])
def test_random_signs(probability: float) -> None:
    q = made(init="random-sign", sign_probability=probability, size=5000)
    loc = q.loc.detach()
    assert set(loc.unique().tolist()) <= {-1.0, 1.0}
    n, error = loc.numel(), math.sqrt(probability * (1 - probability))
    assert float((loc == 1).double().mean()) == pytest.approx(probability, abs=4 * error / math.sqrt(n))
    if 0 < probability < 1:
        both = torch.corrcoef(loc).fill_diagonal_(0)
        assert float(both.abs().max()) < 4 / math.sqrt(5000), "members are independent"
        assert torch.equal(made(init="random-sign", sign_probability=probability, size=5000).loc, q.loc)


@pytest.mark.parametrize("posterior", ["deterministic", "normal-fixed-std", "cauchy"])
def test_random_signs_make_different_members(posterior: Any) -> None:
    bnn = bayesify(nn.Linear(16, 3), members=3, posterior=posterior, prior="uniform", init="random-sign")
    outputs = bnn.predict(torch.randn(4, 16)).outputs[:, 0]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert float((outputs[one] - outputs[other]).abs().max()) > 0.1


def locations(**options: Any) -> dict[tuple[str, str], Tensor]:
    """{(site, side): locations} of two linear layers."""
    torch.manual_seed(0)
    bnn = bayesify(nn.Sequential(nn.Linear(500, 500), nn.Linear(500, 500)), init_scale=0.1, **options)
    return {(name, side): factor.loc.detach() for name, side, factor in bnn.factors()}


def test_inputs_of_new_layers_start_with_random_signs() -> None:
    found = locations(new_layers="1")
    signed = found.pop(("1", "s"))
    assert float((signed > 0).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(torch.corrcoef(signed).fill_diagonal_(0).abs().max()) < 0.2, "members are independent"
    for loc in (signed.abs(), *found.values()):
        assert (float(loc.mean()), float(loc.std())) == (
            pytest.approx(1.0, abs=0.01),
            pytest.approx(0.1, abs=0.01),
        )
    again = locations(new_layers=("*1",))
    assert torch.equal(again[("1", "s")], signed)


@pytest.mark.parametrize(
    "options",
    [{"factors": "outputs"}, {"init": "ones"}, {"perturbation": "additive"},
     {"posterior": "log-normal", "prior": "log-normal"}],
    ids=str,
)  # fmt: skip
def test_new_layers_change_nothing_where_there_are_no_signs(options: dict[str, Any]) -> None:
    plain, told = locations(**options), locations(**options, new_layers="1")
    assert plain.keys() == told.keys()
    assert all(torch.equal(plain[key], told[key]) for key in plain)


def test_new_layers_must_be_there() -> None:
    with pytest.raises(ConversionError, match="pattern 'head' matches no layer"):
        locations(new_layers="head")
    with pytest.raises(ConfigError, match="new_layers must hold names"):
        locations(new_layers=(1,))


@pytest.mark.parametrize("init", ["ones", "normal"])
def test_added_factors_start_around_zero(init: Any) -> None:
    loc = made(perturbation="additive", init=init, init_scale=0.3, size=5000).loc.detach()
    assert float(loc.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(loc.std()) == pytest.approx(0.3 if init == "normal" else 0.0, rel=0.03)


# ------------------------------------------------------------------------------------------------ jitter


@pytest.mark.parametrize("posterior", WITH_RHO)
def test_jitter_of_the_spread(posterior: Any) -> None:
    """A normal cut at two standard deviations, which leaves 0.88 of its standard deviation, or none at all."""
    q = made(posterior=posterior, spread_jitter=0.1, size=5000)
    rho, spread = q.get_parameter("rho").detach(), math.sqrt(1e-3 / 0.999)
    assert inverse_softplus(spread) == pytest.approx(RHO, abs=1e-3)
    offset = rho - torch.tensor(inverse_softplus(spread))
    if posterior not in JITTERED:
        assert not offset.any()
        return
    assert float(offset.abs().max()) <= 0.2 + 1e-6
    assert float(offset.abs().max()) > 0.199, "the whole range is used"
    cut = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))
    assert cut == pytest.approx(0.88, abs=0.001)
    assert float(offset.std()) == pytest.approx(0.1 * cut, rel=0.02)
    assert float(offset.mean()) == pytest.approx(0.0, abs=0.003)
    ratio = q.scale.detach() / spread
    assert 0.81 < float(ratio.min()) < 0.84
    assert 1.19 < float(ratio.max()) < 1.23


def test_jitter_follows_the_seed_and_leaves_the_rest() -> None:
    jittered, again, other = (made(seed, spread_jitter=0.1) for seed in (5, 5, 6))
    assert torch.equal(jittered.get_parameter("rho"), again.get_parameter("rho"))
    assert not torch.equal(jittered.get_parameter("rho"), other.get_parameter("rho"))
    plain = made(5)
    assert torch.equal(plain.loc, jittered.loc)
    assert plain.get_parameter("rho").unique().numel() == 1


def test_jitter_reaches_every_site_of_a_network() -> None:
    bnn = bayesify(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), spread_jitter=0.1)
    rhos = torch.cat([q.get_parameter("rho").detach().flatten() for _, _, q in bnn.factors()])
    assert rhos.numel() == 4 * (4 + 5 + 5 + 2)
    assert rhos.unique().numel() > 0.95 * rhos.numel()


# ------------------------------------------------------------------------------------------------ state and config


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("prior", ["uniform", "trainable-std"])
def test_state_survives_saving(posterior: Any, prior: Any) -> None:
    """A factor with another start and another spread draws the same after loading."""
    if prior == "trainable-std" and ("cauchy" in posterior or posterior in ("deterministic", "mixture-of-deltas")):
        prior = "log-uniform"
    one = made(1, 6, posterior=posterior, prior=prior, posterior_scale=0.5, prior_scale=0.2, spread_jitter=0.1)
    two = made(2, 6, posterior=posterior, prior=prior, posterior_scale=0.1, prior_scale=0.2)
    noise = torch.stack([one.noise(5, None) for _ in range(4)])
    assert not torch.equal(one.transform(noise, slice(None)), two.transform(noise, slice(None)))
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.transform(noise, slice(None)), two.transform(noise, slice(None)))
    kls = []
    for q in (one, two):
        torch.manual_seed(0)
        kls.append(kl_divergence(q))
    assert torch.equal(*kls)


@pytest.mark.parametrize(
    "options",
    [
        {"member_bias": True},
        {"member_batch_norm": True, "members": 3},
        {"prior_loc": 0.25},
        {"prior_loc": 0, "prior": "half-cauchy", "posterior": "half-cauchy"},
        {"prior_loc": None, "prior": "half-cauchy", "posterior": "log-normal"},
        {"init": "random-sign", "sign_probability": 0.75, "spread_jitter": 0.1},
        {"perturbation": "additive", "posterior": "normal-shared-std", "prior": "trainable-std"},
        {"posterior": "mixture-of-deltas", "prior": "empirical-bayes", "member_bias": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_new_fields_round_trip_through_json(options: dict[str, Any]) -> None:
    config = Rank1Config(**options)
    written = json.loads(json.dumps(config.non_defaults()))
    assert written == {name: value for name, value in options.items() if value not in (None, False)} | (
        {"prior_loc": 0} if options.get("prior_loc") == 0 else {}
    )
    read = Rank1Config.from_dict(written)
    assert read == config
    assert read.prior_location == config.prior_location
    assert read.neutral == config.neutral
    assert (read.member_bias, read.member_batch_norm) == (config.member_bias, config.member_batch_norm)


@pytest.mark.parametrize(
    ("options", "location"),
    [
        ({}, 1.0),
        ({"prior": "cauchy"}, 1.0),
        ({"perturbation": "additive"}, 0.0),
        ({"posterior": "log-normal"}, 1.0),
        ({"posterior": "log-normal", "prior": "log-normal"}, 0.0),
        ({"posterior": "half-cauchy", "prior": "half-cauchy"}, 0.0),
        ({"prior_loc": 0.0}, 0.0),
        ({"prior_loc": -2.5, "perturbation": "additive"}, -2.5),
    ],
    ids=str,
)
def test_default_location_of_the_prior(options: dict[str, Any], location: float) -> None:
    assert Rank1Config(**options).prior_location == location
    assert make_factor(Rank1Config(**options), 2, CPU).prior.loc == location


def test_normal_at_the_prior_costs_nothing_by_default() -> None:
    """The default prior location is where an untouched factor stands, multiplied or added."""
    for perturbation in ("multiplicative", "additive"):
        q = made(init="ones", posterior_scale=0.1, prior="normal", prior_scale=0.1, perturbation=perturbation)
        assert isinstance(q, NormalFactor)
        assert kl_divergence(q).tolist() == pytest.approx([0.0] * 4, abs=1e-3)
