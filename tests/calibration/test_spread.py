"""Spread without training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import BayesianModel, bayesify
from bayesify.calibration.fisher import example_gradients, fisher, low_rank_fisher
from bayesify.calibration.spread import PRIOR_SCALES, RANK, SPREADS
from bayesify.errors import ConfigError, DataError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).eval()


def converted(**options: Any) -> BayesianModel:
    return bayesify(network(), **{"members": 2, "init_scale": 0.2, **options})


def data(count: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 5), torch.randint(3, (count,))


def state(bnn: BayesianModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in bnn.state_dict().items()}


@pytest.mark.parametrize("noise", ["example", "member"])
def test_fisher_is_the_mean_squared_gradient_of_a_loop_over_examples(noise: str) -> None:
    bnn, (x, _) = converted(noise=noise), data(6)
    found, count = fisher(bnn, [x[:4], x[4:]], seed=3)
    assert count == 6
    generator = torch.Generator().manual_seed(3)
    slow = network().state_dict()
    w1, b1, w2, b2 = slow.values()
    expected = [torch.zeros_like(value) for value in found]
    for batch in (x[:4], x[4:]):
        for member in range(2):
            means = [f.mean[member].detach().clone().requires_grad_() for _, _, f in bnn.factors()]

            def logits(row: Tensor, s1: Tensor, r1: Tensor, s2: Tensor, r2: Tensor) -> Tensor:
                hidden = F.linear(row, w1 * r1[:, None] * s1, b1).tanh()
                return F.linear(hidden, w2 * r2[:, None] * s2, b2)

            outputs = [logits(row, *means).log_softmax(-1) for row in batch]
            labels = torch.multinomial(torch.stack(outputs).detach().exp(), 1, generator=generator)
            for output, label in zip(outputs, labels, strict=True):
                for total, gradient in zip(expected, torch.autograd.grad(output[label].sum(), means), strict=True):
                    total[member] += gradient.square() / 6
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other)


def test_the_variance_is_that_of_laplace_and_nothing_else_changes() -> None:
    bnn, (x, y) = converted(), data()
    before = state(bnn)
    information, count = fisher(bnn, [x], seed=0)
    fit = bnn.fit_spread([(x, y)], prior_scale=0.2)
    for (_, _, factor), own in zip(bnn.factors(), information, strict=True):
        torch.testing.assert_close(factor.scale, (count * own + 25.0).rsqrt())
    for name, value in bnn.state_dict().items():
        assert name.endswith("rho") or torch.equal(value, before[name])
    assert fit.examples == 24
    assert 0 < fit.spread < 0.2
    assert not torch.equal(bnn.predict(x, samples=2, seed=0).outputs[:, 0], bnn.predict(x).outputs[:, 0])


def test_search_takes_the_spread_of_lowest_nll() -> None:
    bnn, (x, _) = converted(init="ones"), data(64)
    with torch.no_grad():
        bnn.model.get_parameter("2.weight").mul_(20)  # far too sure of itself
        y = torch.randint(3, (64,), generator=torch.Generator().manual_seed(2))
    fit = bnn.fit_spread([(x, y)], method="search")
    assert fit.spread in SPREADS
    for _, _, factor in bnn.factors():
        torch.testing.assert_close(factor.scale, torch.full_like(factor.scale, fit.spread))
    chosen = bnn.predict(x, samples=8, seed=0).nll(y)
    assert chosen < bnn.predict(x).nll(y)


@pytest.mark.parametrize(
    ("batches", "method", "error"),
    [
        ([], "fisher", DataError),
        ([], "low-rank", ConfigError),
        ([], "search", DataError),
        ([torch.randn(3, 5)], "search", DataError),
        ([], "x", ConfigError),
    ],
)
def test_what_cannot_be_fitted_leaves_the_model_as_it_was(batches: Any, method: Any, error: type[Exception]) -> None:
    bnn = converted()
    before = state(bnn)
    with pytest.raises(error):
        bnn.fit_spread(batches, method=method)
    assert all(torch.equal(value, before[name]) for name, value in bnn.state_dict().items())


class Loses(nn.Module):
    """A layer whose input is the same for all examples, in code that cannot be traced: the first call finds out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = nn.Linear(4, 3), nn.Linear(5, 3)
        self.register_buffer("inputs", torch.randn(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9:
            x = self.last(x)
        return x + self.table(self.inputs).mean(0)


@pytest.mark.parametrize("method", ["fisher", "low-rank", "search"])
@pytest.mark.parametrize("once", [False, True], ids=["list", "iterator"])
def test_a_site_may_be_lost_on_the_first_batch(method: Any, once: bool) -> None:
    fits = []
    for seen in (False, True):
        bnn = bayesify(Loses(), members=2, init="ones")
        assert len(bnn.report.converted) == 2
        x, y = data()
        if seen:
            bnn.eval()(x)
        batches = [(x[:12], y[:12]), (x[12:], y[12:])]
        fits.append(bnn.fit_spread(iter(batches) if once else batches, method))
        assert list(bnn.report.converted) == ["last"]
    assert fits[0] == fits[1]
    assert fits[0].examples == 24


@pytest.mark.parametrize("method", ["fisher", "low-rank"])
def test_empty_batches_do_not_count(method: Any) -> None:
    x, y = data()
    empty = (x[:0], y[:0])
    one, other = converted(init="ones"), converted(init="ones")
    with pytest.raises(DataError, match="empty"):
        one.fit_spread([empty], method)
    assert one.fit_spread([empty, (x, y)], method) == other.fit_spread([(x, y)], method)


def test_search_needs_numbers_and_no_prior() -> None:
    bnn, (x, y) = converted(), data()
    before = state(bnn)
    with pytest.raises(DataError, match="not finite"):
        bnn.fit_spread([(x / 0, y)], "search")
    with pytest.raises(ConfigError, match="no prior"):
        bnn.fit_spread([(x, y)], "search", prior_scale=0.1)
    assert all(torch.equal(value, before[name]) for name, value in bnn.state_dict().items())


def test_other_posteriors_and_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="posterior='normal'"):
        converted(posterior="deterministic").fit_spread([data()])
    with pytest.raises(DataError, match="classes"):
        bayesify(network(), task="regression").fit_spread([data()])


def test_low_rank_and_diagonal_add_up_to_the_information() -> None:
    bnn, (x, _) = converted(init="ones"), data(40)
    gradients = torch.cat([torch.cat(g, 1) for _, g in example_gradients(bnn, [x[:16], x[16:]], range(1), 0)])
    information = gradients.T @ gradients / 40
    full, rest, count = low_rank_fisher(bnn, [x[:16], x[16:]], rank=len(information), seed=0)
    assert count == 40
    torch.testing.assert_close(full.T @ full, information, rtol=1e-4, atol=1e-7)
    assert rest.abs().max() < 1e-5
    some, rest, _ = low_rank_fisher(bnn, [x[:16], x[16:]], rank=3, seed=0)
    assert some.shape == (3, len(information))
    torch.testing.assert_close((some.T @ some + rest.diag()).diagonal(), information.diagonal(), rtol=1e-4, atol=1e-7)
    values, vectors = torch.linalg.eigh(information)
    nearest = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
    assert (some.T @ some - nearest).norm() < 0.1 * nearest.norm()


def test_members_are_draws_with_the_covariance_of_laplace() -> None:
    members, scale = 4000, 0.2
    bnn, (x, _) = converted(members=members, init="ones"), data(40)
    fit = bnn.fit_spread([x], "low-rank", prior_scale=scale)
    directions, rest, count = low_rank_fisher(bayesify(network(), init="ones"), [x], RANK)
    precision = count * (directions.T @ directions + rest.diag()) + torch.eye(len(rest)) / scale**2
    means = torch.cat([factor.mean.detach() for _, _, factor in bnn.factors()], 1) - 1
    torch.testing.assert_close(means[::2], -means[1::2], rtol=0, atol=1e-5)
    covariance = means[::2].T @ means[::2] / (members // 2)
    expected = torch.linalg.inv(precision)
    deviations = expected.diagonal().sqrt()
    assert ((covariance - expected) / deviations.outer(deviations)).abs().max() < 0.12
    assert fit.spread == pytest.approx(float(covariance.diagonal().mean().sqrt()), rel=0.01)
    assert fit.prior_scale == scale
    assert all(factor.scale.max() < 1e-5 for _, _, factor in bnn.factors())


def test_validation_chooses_the_prior() -> None:
    x, _ = data(200)
    y = torch.randint(3, (200,), generator=torch.Generator().manual_seed(2))

    def sure(**options: Any) -> BayesianModel:
        bnn = converted(init="ones", **options)
        with torch.no_grad():
            bnn.model.get_parameter("2.weight").mul_(20)
        return bnn

    for method in ("fisher", "low-rank"):
        bnn = sure(members=4)
        fit = bnn.fit_spread([x[:100]], method, validation=[(x[100:], y[100:])])  # type: ignore[arg-type]
        assert fit.prior_scale in PRIOR_SCALES
        samples = 8 if method == "fisher" else None
        chosen = float(bnn.predict(x[100:], samples=samples, seed=0).nll(y[100:]))
        for scale in PRIOR_SCALES[: PRIOR_SCALES.index(fit.prior_scale) + 2]:
            other = sure(members=4)
            other.fit_spread([x[:100]], method, prior_scale=scale)  # type: ignore[arg-type]
            assert chosen <= float(other.predict(x[100:], samples=samples, seed=0).nll(y[100:])) + 1e-6


def test_low_rank_needs_one_network_and_several_members() -> None:
    with pytest.raises(ConfigError, match="init='ones'"):
        converted().fit_spread([data()], "low-rank")
    with pytest.raises(ConfigError, match="members=2"):
        converted(members=1, init="ones").fit_spread([data()], "low-rank")
    bnn = converted(init="ones")
    before = state(bnn)
    with pytest.raises(ConfigError, match="leave prior_scale out"):
        bnn.fit_spread([data()], prior_scale=0.1, validation=[data()])
    with pytest.raises(DataError, match="labels"):
        bnn.fit_spread([data()], "low-rank", validation=[data()[0]])
    assert all(torch.equal(value, before[name]) for name, value in bnn.state_dict().items())
