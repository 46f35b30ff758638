"""The KL of every posterior to every prior: its value by quadrature, its estimate, its gradient, its training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayesify import ELBO, BayesianModel, ConfigError, Rank1Config, bayesify
from bayesify.config import PosteriorName, PriorName
from bayesify.distributions import CLIP, POSTERIORS, PRIORS, Factor, kl_divergence, kl_table, kl_variance
from bayesify.distributions.kl import DRAWS
from bayesify.distributions.priors import EmpiricalBayesPrior, LogUniformPrior
from bayesify.distributions.special import mean_log_abs_normal

# What every cell of the table should hold, written down apart from it: zero, closed form, Monte Carlo, refused.
COLUMNS = [
    *("normal", "trainable-std", "tied-mean", "empirical-bayes"),
    *("cauchy", "half-cauchy", "log-normal", "log-uniform", "uniform"),
]
ROWS = {
    "deterministic": "z r z z z z z z z",
    "normal": "c c c c m r r c c",
    "normal-shared-std": "c c c c m r r c c",
    "normal-fixed-std": "c c c c m r r c c",
    "log-normal": "c c c c m m c c c",
    "cauchy": "r r r r c r r c c",
    "half-cauchy": "r r r r m m m m c",
    "mixture-of-deltas": "z r z z z z z z z",
}
KINDS = {"z": "0", "c": "closed form", "m": "Monte Carlo", "r": "–"}
EXPECTED = {
    (row, column): KINDS[c] for row, cells in ROWS.items() for column, c in zip(COLUMNS, cells.split(), strict=True)
}
POSITIVE = ("log-normal", "half-cauchy")
POINTS = ("deterministic", "mixture-of-deltas")
NORMAL_PRIORS = ("normal", "trainable-std", "tied-mean", "empirical-bayes")


def pairs(*kinds: str, without: str = "") -> Any:
    every = itertools.product(POSTERIORS, [prior for prior in PRIORS if prior != without])
    chosen = [pair for pair in every if EXPECTED.get(pair, "new") in kinds]
    return pytest.mark.parametrize(("posterior", "prior"), chosen, ids=lambda name: name)


every_allowed_pair = pairs("0", "closed form", "Monte Carlo")


def build(
    posterior: str, prior: str, locs: Any, scale: float, prior_loc: float = 0.0, prior_scale: float = 0.1
) -> Factor:
    """A factor with these locations; those of a log-normal posterior are given in log space."""
    init = torch.as_tensor(locs, dtype=torch.float32)
    if posterior == "log-normal":
        init = init.exp()
    return POSTERIORS[posterior](init, scale, PRIORS[prior].make(prior_loc, prior_scale, init))


def close(found: float, expected: float, tolerance: float = 1e-5) -> bool:
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))


# ------------------------------------------------------------------------------------------------ quadrature


class Law(NamedTuple):
    """One element's posterior in float64: f = value(t) with t of a density that decays fast on [low, high]."""

    low: float
    high: float
    density: Callable[[Any], Any]
    value: Callable[[Any], Any]
    log_q: Callable[[Any], Any]
    where: Callable[[float], float]
    """The t of a value f."""


def law(posterior: str, loc: float, scale: float) -> Law:
    if posterior.startswith("normal"):
        return Law(
            -14.0,
            14.0,
            lambda t: np.exp(-t * t / 2) / math.sqrt(2 * math.pi),
            lambda t: loc + scale * t,
            lambda t: -t * t / 2 - math.log(scale * math.sqrt(2 * math.pi)),
            lambda f: (f - loc) / scale,
        )
    if posterior == "log-normal":
        return Law(
            -14.0,
            14.0,
            lambda t: np.exp(-t * t / 2) / math.sqrt(2 * math.pi),
            lambda t: np.exp(loc + scale * t),
            lambda t: -t * t / 2 - math.log(scale * math.sqrt(2 * math.pi)) - loc - scale * t,
            lambda f: (math.log(f) - loc) / scale if f > 0 else -math.inf,
        )
    sides = {"cauchy": 1.0, "half-cauchy": 2.0}[posterior]
    return Law(
        -45.0 if sides == 1 else 0.0,
        45.0,
        lambda t: sides / (math.pi * np.cosh(t)),
        lambda t: loc + scale * np.sinh(t),
        lambda t: math.log(sides / (math.pi * scale)) - 2 * np.log(np.cosh(t)),
        lambda f: math.asinh((f - loc) / scale),
    )


def log_abs(f: Any) -> Any:
    return np.log(np.maximum(np.abs(f), 1e-300))  # a node may fall on 0; its weight is nothing


LOG_PRIORS: dict[str, Callable[[Any, float, float], Any]] = {
    "normal": lambda f, m, p: -(((f - m) / p) ** 2) / 2 - math.log(p * math.sqrt(2 * math.pi)),
    "cauchy": lambda f, m, p: -np.log1p(((f - m) / p) ** 2) - math.log(math.pi * p),
    "half-cauchy": lambda f, m, p: np.where(f < m, -np.inf, math.log(2 / (math.pi * p)) - np.log1p(((f - m) / p) ** 2)),
    "log-normal": lambda f, m, p: -(((np.log(f) - m) / p) ** 2) / 2 - np.log(f * (p * math.sqrt(2 * math.pi))),
    "log-uniform": lambda f, m, p: log_c() - log_abs(f),
    "uniform": lambda f, m, p: np.zeros_like(f),
}
SHARP = {"cauchy": "m", "half-cauchy": "m", "log-normal": "0", "log-uniform": "0"}
"""Where a log-prior is not smooth: around its location, or around 0."""


def integrate(function: Callable[[Any], Any], low: float, high: float, sharp: list[float]) -> float:
    """Gauss–Legendre on panels that shrink geometrically towards the sharp points."""
    steps = np.geomspace(1e-14, 2 * (high - low), 64)
    edges = [np.linspace(low, high, 65)] + [np.concatenate([t - steps, [t], t + steps]) for t in sharp]
    edge = np.unique(np.concatenate(edges))
    edge = edge[(edge >= low) & (edge <= high)]
    nodes, weights = np.polynomial.legendre.leggauss(16)
    half = np.diff(edge)[:, None] / 2
    return float((half * weights * function((edge[1:] + edge[:-1])[:, None] / 2 + half * nodes)).sum())


def expectation(q: Law, function: Callable[[Any], Any], *sharp: float) -> float:
    """E function(f) under one element's posterior."""
    points = [t for t in map(q.where, sharp) if math.isfinite(t)]
    return integrate(lambda t: q.density(t) * function(q.value(t)), q.low, q.high, points)


def log_c() -> float:
    """C of the log-uniform prior: the KL of a standard normal to C / |f| is 0."""
    if not _LOG_C:
        own = law("normal", 0.0, 1.0)
        entropy = integrate(lambda t: -own.density(t) * own.log_q(t), own.low, own.high, [])
        _LOG_C.append(expectation(own, log_abs, 0.0) - entropy)
    return _LOG_C[0]


_LOG_C: list[float] = []


def exact_kl(posterior: str, prior: str, loc: float, scale: float, prior_loc: float, prior_scale: float) -> float:
    """KL of one element in float64: E log q − E log p."""
    q = law(posterior, loc, scale)
    if prior == "tied-mean":
        prior_loc = math.exp(loc + scale**2 / 2) if posterior == "log-normal" else loc
    density = LOG_PRIORS["normal" if prior in NORMAL_PRIORS else prior]
    negative_entropy = integrate(lambda t: q.density(t) * q.log_q(t), q.low, q.high, [])
    sharp = {"m": [prior_loc], "0": [0.0], "": []}[SHARP.get(prior, "")]
    return negative_entropy - expectation(q, lambda f: density(f, prior_loc, prior_scale), *sharp)


def elements(q: Factor) -> Iterator[tuple[int, int, float, float]]:
    """(member, element, loc, scale), as the factor has them after constraints."""
    loc, scale = q.loc.detach().double(), q.scale.detach().double()
    for k, i in itertools.product(range(q.members), range(q.size)):
        yield k, i, float(loc[k, i]), float(scale[k, i])


def exact_member_kl(q: Factor, prior_loc: float, prior_scale: float) -> list[float]:
    """[K] the sum over elements."""
    sums = [0.0] * q.members
    for k, _, loc, scale in elements(q):
        sums[k] += exact_kl(q.family, q.prior.family, loc, scale, prior_loc, prior_scale)
    return sums


def test_quadrature_knows_what_torch_knows() -> None:
    """The yardstick itself: three divergences in closed form, and an entropy."""
    d = torch.distributions
    a, b = torch.tensor([0.3, 1.7], dtype=torch.float64), torch.tensor([-2.0, 0.05], dtype=torch.float64)
    for name, cls in (("normal", d.Normal), ("log-normal", d.LogNormal), ("cauchy", d.Cauchy)):
        expected = float(d.kl_divergence(cls(*a), cls(*b)))
        assert close(exact_kl(name, name, 0.3, 1.7, -2.0, 0.05), expected, 1e-11)
    assert close(exact_kl("half-cauchy", "uniform", 3.0, 0.2, 0, 1), -float(d.HalfCauchy(0.2).entropy()), 1e-7)
    assert log_c() == pytest.approx(-0.5 * (math.log(2) + np.euler_gamma) - 0.5 * math.log(2 * math.pi * math.e))


# ------------------------------------------------------------------------------------------------ the table


def test_every_family_has_a_row_here() -> None:
    """A new family fails here until the table above says what its pairs are, and a density or a law for it exists."""
    assert set(EXPECTED) == set(itertools.product(POSTERIORS, PRIORS))
    assert set(LOG_PRIORS) | set(NORMAL_PRIORS) == set(PRIORS)
    for posterior in POSTERIORS:
        assert EXPECTED[posterior, "normal"] == "0" or law(posterior, 1.0, 1.0)
    assert get_args(PosteriorName) == tuple(POSTERIORS)
    assert get_args(PriorName) == tuple(PRIORS)


def test_kl_table_tells_the_kind_of_every_pair() -> None:
    lines = kl_table().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header, rule, *body = rows
    assert header == ["posterior \\ prior", *PRIORS]
    assert set(rule) == {"---"}
    assert len(rule) == len(header)
    assert [row[0] for row in body] == list(POSTERIORS)
    found = {(row[0], prior): cell for row in body for prior, cell in zip(PRIORS, row[1:], strict=True)}
    assert found == EXPECTED


def test_kl_table_gives_a_reason_for_every_refused_pair() -> None:
    reasons: dict[str, str] = {}
    for line in kl_table().splitlines():
        if line.startswith("* –: "):
            named, reason = line.removeprefix("* –: ").split(": ")
            reasons |= dict.fromkeys(named.split(", "), reason)
    refused = {f"{q} ‖ {p}" for (q, p), kind in EXPECTED.items() if kind == "–"}
    assert set(reasons) == refused
    assert {name for name, why in reasons.items() if "no variance" in why} == {
        f"{q} ‖ {p}" for q in ("cauchy", "half-cauchy") for p in NORMAL_PRIORS
    }
    assert {name for name, why in reasons.items() if "point mass" in why} == {f"{q} ‖ trainable-std" for q in POINTS}


@pairs("–")
def test_refused_pairs_say_why(posterior: Any, prior: Any) -> None:
    reason = "no variance" if prior in NORMAL_PRIORS else "mass below zero"
    reason = "point mass" if posterior in POINTS else reason
    message = f"a {posterior} posterior and a {prior} prior do not go together: .*{reason}"
    with pytest.raises(ConfigError, match=message):
        Rank1Config(posterior=posterior, prior=prior)
    q = build(posterior, prior, [[1.0]], 0.1)
    with pytest.raises(ConfigError, match=f"no KL of a {posterior} posterior to a {prior} prior .*{reason}.*uniform"):
        kl_divergence(q)


@every_allowed_pair
def test_allowed_pairs_are_accepted(posterior: Any, prior: Any) -> None:
    bnn = bayesify(nn.Linear(3, 2), posterior=posterior, prior=prior)
    assert [(f.family, f.prior.family) for _, _, f in bnn.factors()] == [(posterior, prior)] * 2
    assert (float(bnn.kl().detach()) == 0.0) == (EXPECTED[posterior, prior] == "0")


@pytest.mark.parametrize("posterior", ["log-normal", "half-cauchy"])
def test_half_cauchy_prior_must_start_at_zero_or_below(posterior: Any) -> None:
    with pytest.raises(ConfigError, match=r"half-cauchy prior that starts at 0\.5 .*prior_loc of 0 or less"):
        Rank1Config(posterior=posterior, prior="half-cauchy", prior_loc=0.5)
    assert Rank1Config(posterior=posterior, prior="half-cauchy").prior_location == 0.0
    assert Rank1Config(posterior=posterior, prior="half-cauchy", prior_loc=-1.0).prior_location == -1.0
    assert Rank1Config(posterior="deterministic", prior="half-cauchy", prior_loc=0.5).prior_location == 0.5


@pytest.mark.parametrize("posterior", POSITIVE)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "random-sign"}, "init='random-sign' starts at −1, which a {} posterior cannot reach"),
        ({"perturbation": "additive"}, "perturbation='additive' .* those of a {} posterior are positive"),
    ],
    ids=["random-sign", "additive"],
)
def test_positive_posteriors_refuse_what_they_cannot_reach(posterior: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.format(posterior)):
        Rank1Config(posterior=posterior, prior="uniform", **options)


# ------------------------------------------------------------------------------------------------ closed forms

PRIOR_SETTINGS = [(1.0, 0.1), (0.0, 1.0), (-2.0, 3.0)]


def locs_and_scales(posterior: str, prior: str) -> tuple[list[float], list[float]]:
    if posterior == "half-cauchy":
        return [1e-4, 0.97, 40.0], [1e-5, 0.03, 1.0, 300.0]
    if posterior == "log-normal":
        # Moments beyond exp(20) are continued linearly in the package; these stay below.
        moments = prior in NORMAL_PRIORS
        return [-3.0, 0.0, 0.1, 2.0], [1e-5, 0.03, 0.5, 2.0 if moments else 30.0]
    return [-3.0, 0.0, 0.97, 1.0, 40.0], [1e-5, 0.03, 1.0, 300.0]


@pairs("closed form", without="empirical-bayes")  # it couples the elements: by hand below
def test_closed_form_equals_quadrature(posterior: str, prior: str) -> None:
    locs, scales = locs_and_scales(posterior, prior)
    for scale, (prior_loc, prior_scale) in itertools.product(scales, PRIOR_SETTINGS):
        q = build(posterior, prior, [[loc] for loc in locs], scale, prior_loc, prior_scale)
        assert all(close(s, scale, 0.01 * scale) for *_, s in elements(q))
        found = kl_divergence(q).tolist()
        for k, _, loc, spread in elements(q):
            expected = exact_kl(posterior, prior, loc, spread, prior_loc, prior_scale)
            assert close(found[k], expected), (loc, spread, prior_loc, prior_scale)


@pytest.mark.parametrize(
    ("posterior", "prior", "torch_name"),
    [
        ("normal-shared-std", "normal", "Normal"),
        ("normal-fixed-std", "normal", "Normal"),
        ("normal", "trainable-std", "Normal"),
        ("log-normal", "log-normal", "LogNormal"),
        ("cauchy", "cauchy", "Cauchy"),
    ],
)
def test_closed_form_equals_torch(posterior: str, prior: str, torch_name: str) -> None:
    """A member's KL is the sum over its elements, not their mean."""
    for scale, (prior_loc, prior_scale) in itertools.product([1e-4, 0.1, 5.0], PRIOR_SETTINGS):
        q = build(posterior, prior, torch.randn(3, 6), scale, prior_loc, prior_scale)
        cls = getattr(torch.distributions, torch_name)
        own = cls(q.loc.detach().double(), q.scale.detach().double())
        expected = torch.distributions.kl_divergence(own, cls(torch.tensor(prior_loc).double(), prior_scale)).sum(-1)
        torch.testing.assert_close(kl_divergence(q).detach().double(), expected, rtol=1e-5, atol=1e-5)


@pairs("closed form", without="empirical-bayes")  # it couples the elements: by hand below
def test_member_kl_is_the_sum_over_its_elements(posterior: str, prior: str) -> None:
    q = build(posterior, prior, torch.rand(2, 4) + 0.5, 0.2, 0.3, 0.7)
    for found, expected in zip(kl_divergence(q).tolist(), exact_member_kl(q, 0.3, 0.7), strict=True):
        assert close(found, expected)


def by_hand(q: Factor, center: float) -> tuple[list[list[float]], list[list[float]]]:
    """E (f − center)² and the entropy of every element, by the textbook, in float64."""
    moments = [[0.0] * q.size for _ in range(q.members)]
    entropies = [[0.0] * q.size for _ in range(q.members)]
    for k, i, mu, s in elements(q):
        entropies[k][i] = math.log(s) + 0.5 * math.log(2 * math.pi * math.e)
        moments[k][i] = s**2 + (mu - center) ** 2
        if q.family == "log-normal":
            entropies[k][i] += mu
            mean = math.exp(mu + s**2 / 2)
            moments[k][i] = math.expm1(s**2) * math.exp(2 * mu + s**2) + (mean - center) ** 2
    return moments, entropies


@pytest.mark.parametrize("posterior", [p for p in POSTERIORS if EXPECTED.get((p, "empirical-bayes")) == "closed form"])
@pytest.mark.parametrize("scale", [1e-5, 0.03, 1.0])
@pytest.mark.parametrize("prior_loc", [1.0, -4.0])
def test_empirical_bayes_by_hand(posterior: str, scale: float, prior_loc: float) -> None:
    """v* = (Σ E(f − m)² + 2b) / (n + 2a + 2), and the members share −log InvGamma(v*; a, b) evenly."""
    a, b, members, size = 2.01, 0.101, 3, 5
    q = build(posterior, "empirical-bayes", 0.5 * torch.randn(members, size), scale, prior_loc)
    moments, entropies = by_hand(q, prior_loc)
    v = (sum(map(sum, moments)) + 2 * b) / (members * size + 2 * a + 2)
    log_hyperprior = a * math.log(b) - math.lgamma(a) - (a + 1) * math.log(v) - b / v
    for k, found in enumerate(kl_divergence(q).tolist()):
        cross = sum(m / (2 * v) + 0.5 * math.log(2 * math.pi * v) for m in moments[k])
        assert close(found, cross - sum(entropies[k]) - log_hyperprior / members)


@pytest.mark.parametrize("posterior", [p for p in POSTERIORS if EXPECTED.get((p, "tied-mean")) == "closed form"])
@pytest.mark.parametrize("scale", [1e-5, 0.03, 1.0])
def test_tied_mean_by_hand(posterior: str, scale: float) -> None:
    """−H + log(2πp²)/2 + Var f / (2p²): for a normal log(p/s) + s²/(2p²) − 1/2, wherever its mean is."""
    p = 0.3
    q = build(posterior, "tied-mean", 0.5 * torch.randn(2, 4), scale, 77.0, p)
    _, entropies = by_hand(q, 0.0)
    expected = [-sum(row) + 4 * 0.5 * math.log(2 * math.pi * p**2) for row in entropies]
    for k, _, mu, s in elements(q):
        log_normal = posterior == "log-normal"
        expected[k] += (math.expm1(s**2) * math.exp(2 * mu + s**2) if log_normal else s**2) / (2 * p**2)
    assert all(close(*both) for both in zip(kl_divergence(q).tolist(), expected, strict=True))
    if not log_normal:
        kl_divergence(q).sum().backward()
        assert not q.loc.grad.any(), "means are free"


@pytest.mark.parametrize("posterior", [p for p in POSTERIORS if EXPECTED.get((p, "trainable-std")) == "closed form"])
def test_trainable_std_by_hand(posterior: str) -> None:
    """Each element has a prior scale of its own; the best one is the root of E (f − m)²."""
    m = 1.3
    q = build(posterior, "trainable-std", 0.3 * torch.randn(2, 3), 0.2, m, 0.5)
    rho = q.prior.get_parameter("rho")
    assert rho.shape == (2, 3)
    torch.testing.assert_close(q.prior.scale, torch.full((2, 3), 0.5))
    with torch.no_grad():
        rho.uniform_(-6.0, 3.0)
    moments, entropies = by_hand(q, m)
    scales = [[math.log1p(math.exp(value)) + 1e-7 for value in row] for row in rho.tolist()]
    for k, found in enumerate(kl_divergence(q).tolist()):
        cross = [math.log(p) + m2 / (2 * p * p) for p, m2 in zip(scales[k], moments[k], strict=True)]
        assert close(found, sum(cross) + 3 * 0.5 * math.log(2 * math.pi) - sum(entropies[k]))
    with torch.no_grad():
        rho.copy_(torch.expm1(torch.tensor(moments).sqrt()).log())
    kl_divergence(q).sum().backward()
    assert float(rho.grad.abs().max()) < 1e-5


@pytest.mark.parametrize("posterior", [p for p in POSTERIORS if EXPECTED.get((p, "uniform")) == "closed form"])
def test_improper_constants(posterior: str) -> None:
    """Uniform: density 1, so a tenfold spread costs log 10 less. Log-uniform does not see the unit of f at all."""
    positive = posterior in POSITIVE
    narrow, wide = (kl_divergence(build(posterior, "uniform", [[1.0]], scale)).item() for scale in (0.1, 1.0))
    assert narrow - wide == pytest.approx(math.log(10.0), rel=1e-5)
    if not positive:
        for scale in (1e-4, 1.0, 1e3):
            q = build(posterior, "log-uniform", [[0.0, 5.0 * scale]], scale)
            twice = build(posterior, "log-uniform", [[0.0, 10.0 * scale]], 2 * scale)
            assert close(kl_divergence(q).item(), kl_divergence(twice).item())
            if posterior != "cauchy":
                zero = build(posterior, "log-uniform", [[0.0]], scale)
                assert kl_divergence(zero).item() == pytest.approx(0.0, abs=1e-6)


# ------------------------------------------------------------------------------------------------ Monte Carlo

MONTE_CARLO_CASES = {
    "normal": [(1.0, 0.03), (-4.0, 0.5), (0.0, 50.0), (1.0, 1e-5)],
    "log-normal": [(0.0, 0.03), (-2.0, 1.0), (1.0, 2.5)],
    "half-cauchy": [(1.0, 0.03), (0.05, 1.0), (3.0, 200.0), (1.0, 1e-5), (1e-5, 1e-4)],
}
MONTE_CARLO_PRIORS = {
    "cauchy": [(1.0, 0.1), (-2.0, 3.0)],
    "half-cauchy": [(0.0, 0.1), (-2.0, 3.0)],
    "log-normal": [(0.0, 0.1), (-1.0, 2.0)],
    "log-uniform": [(0.0, 1.0)],
}


@pairs("Monte Carlo")
def test_estimate_agrees_with_quadrature(posterior: str, prior: str) -> None:
    """A million draws an element: within three standard errors, which the sample itself gives."""
    rows, size = 500, 250
    assert rows * size * DRAWS == 1_000_000
    family = "normal" if posterior.startswith("normal") else posterior
    for (loc, scale), (m, p) in itertools.product(MONTE_CARLO_CASES[family], MONTE_CARLO_PRIORS[prior]):
        q = build(posterior, prior, torch.full((rows, size), loc), scale, m, p)
        with torch.no_grad():
            sample = kl_divergence(q).double() / size
        _, _, own_loc, own_scale = next(elements(q))
        expected = exact_kl(posterior, prior, own_loc, own_scale, m, p)
        error = float(sample.std()) / math.sqrt(rows)
        rounding = 1e-6 * max(1.0, abs(expected))  # float32; matters where the spread is tiny
        assert abs(float(sample.mean()) - expected) < 3 * error + rounding, (loc, scale, m, p)


@pairs("Monte Carlo")
def test_kl_variance_predicts_the_scatter_of_repeated_calls(posterior: str, prior: str) -> None:
    m, p = MONTE_CARLO_PRIORS[prior][0]
    copies = 500
    rows = torch.tensor([[1.0, 0.4, 2.0], [0.7, 0.7, 0.1]])
    q = build(posterior, prior, rows.repeat_interleave(copies, 0), 0.3, m, p)
    with torch.no_grad():
        calls = torch.stack([kl_divergence(q) for _ in range(20)]).unflatten(1, (2, copies))
    empirical = calls.transpose(0, 1).flatten(1).double().var(1)
    predicted = kl_variance(build(posterior, prior, rows, 0.3, m, p), draws=100_000)
    assert predicted.tolist() == pytest.approx(empirical.tolist(), rel=0.15)
    assert float(empirical.min()) > 0


@pairs("0", "closed form")
def test_kl_variance_is_zero_where_the_kl_is_exact(posterior: str, prior: str) -> None:
    q = build(posterior, prior, torch.rand(3, 4) + 0.5, 0.3)
    state = torch.get_rng_state()
    first, second = kl_divergence(q), kl_divergence(q)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state), "an exact KL draws nothing"
    assert kl_variance(q).tolist() == [0.0, 0.0, 0.0]


def test_estimate_is_not_clipped() -> None:
    """N(0, 50²) to Cauchy(0, 1): with draws clipped to ±10 the estimate would be 2 nats short."""
    rows, size = 200, 100
    q = build("normal", "cauchy", torch.zeros(rows, size), 50.0, 0.0, 1.0)
    with torch.no_grad():
        sample = kl_divergence(q).double() / size
    _, _, loc, scale = next(elements(q))
    own = law("normal", loc, scale)
    expected = exact_kl("normal", "cauchy", loc, scale, 0.0, 1.0)
    log_p = LOG_PRIORS["cauchy"]
    lost = expectation(own, lambda f: log_p(f.clip(-CLIP, CLIP), 0, 1) - log_p(f, 0, 1), 0.0, CLIP, -CLIP)
    error = float(sample.std()) / math.sqrt(rows)
    assert lost > 1.0 > 100 * error
    assert abs(float(sample.mean()) - expected) < 3 * error


def test_estimate_makes_draws_of_its_own() -> None:
    """Not those that a forward pass holds; new ones at each call; the same ones after the same seed."""
    q = build("normal", "cauchy", torch.ones(2, 3), 0.5)
    torch.manual_seed(4)
    first, second = kl_divergence(q), kl_divergence(q)
    assert bool((first != second).all())
    q.hold(torch.full((2, 3), 1e6))
    torch.manual_seed(4)
    assert torch.equal(kl_divergence(q), first)


def test_estimate_leaves_seeded_predictions_alone() -> None:
    bnn = bayesify(nn.Linear(5, 3), posterior="normal", prior="cauchy", posterior_scale=0.5)
    x = torch.randn(4, 5)
    first = bnn.predict(x, samples=3, seed=11).outputs
    kls = {float(bnn.kl().detach()) for _ in range(3)}
    assert len(kls) == 3
    assert torch.equal(bnn.predict(x, samples=3, seed=11).outputs, first)
    assert not torch.equal(bnn.predict(x, samples=3, seed=12).outputs, first)


@pairs("Monte Carlo")
def test_gradient_of_the_estimate_is_that_of_the_kl(posterior: str, prior: str) -> None:
    """Averaged over many draws, d KL / d loc equals the difference quotient of the quadrature."""
    m, p = MONTE_CARLO_PRIORS[prior][-1]
    rows, size = 400, 250
    q = build(posterior, prior, torch.full((rows, size), 1.0), 0.4, m, p)
    kl = kl_divergence(q)
    parameter = q.get_parameter("lower") if posterior == "half-cauchy" else q.loc
    sample = torch.autograd.grad(kl.sum(), parameter)[0].double().mean(1)
    _, _, loc, scale = next(elements(q))
    step = 1e-4
    low, high = (exact_kl(posterior, prior, loc + sign * step, scale, m, p) for sign in (-1, 1))
    slope = 1 - math.exp(-loc) if posterior == "half-cauchy" else 1.0  # d softplus = sigmoid
    error = float(sample.std()) / math.sqrt(rows)
    assert abs(float(sample.mean()) - (high - low) / (2 * step) * slope) < 3 * error + 1e-5


# ------------------------------------------------------------------------------------------------ zero


@pairs("0")
def test_point_masses_carry_no_kl(posterior: str, prior: str) -> None:
    """Exactly zero, and a zero gradient for every parameter of the factor and of its prior."""
    q = build(posterior, prior, 3 * torch.randn(3, 4), 0.5, -2.0)
    kl = kl_divergence(q)
    assert kl.tolist() == [0.0, 0.0, 0.0]
    kl.sum().backward()
    for name, parameter in q.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


# ------------------------------------------------------------------------------------------------ extremes

SPREADS = [1e-9, 1e-7, 1e-3, 1.0, 1e2, 1e4]


@every_allowed_pair
@pytest.mark.parametrize("spread", SPREADS)
def test_kl_and_draws_have_finite_gradients_at_extremes(posterior: str, prior: str, spread: float) -> None:
    """Locations from −1e4 to 1e4, those of positive posteriors on the line of their parameter."""
    row = [0.0, 1.0, -1.0, 1e4, -1e4]
    q = build(posterior, prior, torch.ones(2, 5), spread, 0.0, 0.1)
    line = {"half-cauchy": "lower", "mixture-of-deltas": "points"}.get(posterior, "loc")
    with torch.no_grad():
        q.get_parameter(line).copy_(torch.tensor(row).expand_as(q.get_parameter(line)))
    noise = torch.stack([q.noise(6, None) for _ in range(2)])
    draws = q.transform(noise, slice(None))
    assert torch.isfinite(draws).all()
    assert not bool((draws.abs() > CLIP).any())
    assert torch.isfinite(q.mean).all()
    for value in (draws.square().sum(), kl_divergence(q).sum(), q.mean.sum()):
        assert torch.isfinite(value)
        names, parameters = zip(*q.named_parameters(), strict=True)
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            assert gradient is None or torch.isfinite(gradient).all(), name


@every_allowed_pair
def test_kl_reaches_every_parameter(posterior: str, prior: str) -> None:
    """If only with a zero: data parallelism waits for the gradient of each, also at sites a forward pass leaves out."""
    q = build(posterior, prior, torch.ones(2, 3), 0.2)
    kl_divergence(q).sum().backward()
    assert [name for name, parameter in q.named_parameters() if parameter.grad is None] == []


# ------------------------------------------------------------------------------------------------ training


def train_ten_steps(bnn: BayesianModel, inputs: Tensor, targets: Tensor) -> None:
    bnn.train()
    objective = ELBO(bnn, num_examples=len(targets))
    optimizer = torch.optim.Adam(bnn.parameters(), lr=0.05)
    before = [p.detach().clone() for p in bnn.parameters()]
    losses = []
    for _ in range(10):
        terms = objective(bnn(inputs), targets)
        optimizer.zero_grad()
        terms.loss.backward()
        for name, parameter in bnn.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        optimizer.step()
        losses.append(float(terms.loss.detach()))
    assert all(map(math.isfinite, losses))
    for (name, parameter), old in zip(bnn.named_parameters(), before, strict=True):
        assert torch.isfinite(parameter).all(), name
        assert not torch.equal(parameter, old) or not parameter.grad.any(), name
    bnn.eval()
    assert torch.isfinite(bnn.predict(inputs, samples=2, seed=0).probs).all()


@every_allowed_pair
def test_ten_training_steps(posterior: Any, prior: Any) -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    bnn = bayesify(network, members=2, posterior=posterior, prior=prior)
    train_ten_steps(bnn, torch.randn(16, 6), torch.randint(3, (16,)))


@pytest.mark.parametrize(("posterior", "prior"), [("cauchy", "cauchy"), ("log-normal", "log-normal")])
def test_ten_training_steps_of_an_lstm(posterior: Any, prior: Any) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    bnn = bayesify(Reader(), members=2, posterior=posterior, prior=prior)
    assert len({name for name, _, _ in bnn.factors()}) == 3, "input, recurrent and head weights"
    train_ten_steps(bnn, torch.randn(8, 5, 4), torch.randint(3, (8,)))


# ------------------------------------------------------------------------------------------------ published mistakes


def test_log_uniform_has_the_sign_of_a_kl() -> None:
    """The released regularizer returned minus the KL; see Molchanov et al. 2017 for the approximation."""
    log_alpha = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)
    q = build("normal", "log-uniform", (0.3 * torch.exp(-log_alpha / 2))[:, None], 0.3)
    kl = kl_divergence(q).detach().double()
    k1, k2, k3 = 0.63576, 1.8732, 1.48695
    released = k1 * torch.sigmoid(k2 + k3 * log_alpha) - 0.5 * torch.log1p(torch.exp(-log_alpha)) - k1
    assert float((kl + released).abs().max()) < 0.01
    assert float(kl.min()) >= 0.0
    assert bool((kl.diff() < 1e-6).all())
    assert bool((kl[:140].diff() < 0).all()), "the noisier, the cheaper"
    assert float((kl - released)[log_alpha <= 0].min()) > 0.5
    assert float((kl - released).max()) > 9.0


@pytest.mark.parametrize("z", [0.0, 1e-3, 0.5, 1.0, 2.5, 5.0, 5.99, 6.0, 6.01, 8.0, 50.0, 1e4])
def test_mean_log_abs_normal(z: float) -> None:
    """Value and slope on both sides of the switch between its two series."""
    own = law("normal", z, 1.0)
    expected = expectation(own, log_abs, 0.0)
    x = torch.tensor(z, requires_grad=True)
    found = mean_log_abs_normal(x)
    assert close(float(found.detach()), expected, 1e-6 if z >= 6 else 3e-6)
    found.backward()
    step = 1e-3
    low, high = (expectation(law("normal", z + d, 1.0), log_abs, 0.0) for d in (-step, step))
    assert float(x.grad) == pytest.approx((high - low) / (2 * step), abs=2e-5, rel=1e-4)


def test_empirical_bayes_variance_is_the_true_spread() -> None:
    """v* from (μ − m)²: the released one took μ², so that m = 1 gave v* ≈ 1 whatever the spread."""
    members, size, spread = 4, 250, 0.03
    n = members * size
    init = torch.ones(members, size)
    q = build("normal", "empirical-bayes", init, spread, 1.0)
    assert isinstance(q.prior, EmpiricalBayesPrior)
    variance = q.prior.variance(q.second_moment(q.prior.loc)).item()
    assert variance == pytest.approx((n * spread**2 + 2 * 0.101) / (n + 2 * 2.01 + 2), rel=1e-5)
    assert 0.8 * spread**2 < variance < 1.5 * spread**2
    released = (n * (spread**2 + 1) + 2 * 0.101) / (n + 2 * 2.01 + 2)
    assert released > 0.9


def test_empirical_bayes_variance_is_the_best_one() -> None:
    """The objective Σ KL(q ‖ N(m, v)) − log InvGamma(v) is least at v*, so its gradient needs no share of v*'s."""
    a, b, m = 2.01, 0.101, 1.0
    q = build("normal", "empirical-bayes", 1 + 0.2 * torch.randn(3, 4), 0.05, m)
    mu, s = q.loc.detach().double(), q.scale.detach().double()

    def objective(v: Tensor) -> Tensor:
        kl = 0.5 * ((s**2 + (mu - m) ** 2) / v - 1 + torch.log(v / s**2))
        hyperprior = torch.distributions.InverseGamma(torch.tensor(a).double(), torch.tensor(b).double())
        return kl.sum() - hyperprior.log_prob(v)

    assert isinstance(q.prior, EmpiricalBayesPrior)
    v = q.prior.variance(q.second_moment(m)).detach().double()
    total = kl_divergence(q).sum()
    least = float(objective(v))
    assert close(total.item(), least)
    best = v.clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(best), best)
    curvature = (float(objective(v * 1.01) + objective(v * 0.99)) - 2 * least) / float(v * 0.01) ** 2
    assert abs(float(slope)) < 1e-5 * curvature * float(v)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert float(objective(v * factor)) > least
    total.backward()
    torch.testing.assert_close(q.loc.grad.double(), (mu - m) / v, rtol=1e-4, atol=1e-4)


def test_log_uniform_constant() -> None:
    assert pytest.approx(log_c(), abs=1e-9) == LogUniformPrior.LOG_C
