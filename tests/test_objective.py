"""The objective against sums written out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify import ELBO, BayesianModel, BayesifyError, ConfigError, DataError, bayesify

K, B, C = 3, 4, 5


def network(**options: Any) -> BayesianModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, C))
    return bayesify(model, members=K, init_scale=0.3, posterior_scale=0.2, **options).train()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, 6), torch.tensor([0, 4, 2, 2])


def log_prob(logits: Tensor, label: int) -> float:
    """log softmax(logits)[label] in plain Python."""
    values = logits.tolist()
    return values[label] - math.log(sum(math.exp(v) for v in values))


def test_average_likelihood_by_hand() -> None:
    bnn = network()
    x, y = batch()
    rows = bnn(x)
    nll = -sum(log_prob(rows[k * B + i], int(y[i])) for k in range(K) for i in range(B)) / (K * B)
    kl = bnn.kl().item()
    terms = ELBO(bnn, 50)(rows, y)
    assert terms.nll.item() == pytest.approx(nll, rel=1e-5)
    assert terms.kl.item() == kl
    assert terms.weight == 1.0
    assert terms.loss.item() == pytest.approx(nll + kl / 50, rel=1e-5)


def test_mixture_likelihood_by_hand() -> None:
    bnn = network()
    x, y = batch()
    rows = bnn(x)
    nll = 0.0
    for i in range(B):
        probability = sum(math.exp(log_prob(rows[k * B + i], int(y[i]))) for k in range(K)) / K
        nll -= math.log(probability) / B
    terms = ELBO(bnn, 50, likelihood="mixture")(rows, y)
    assert terms.nll.item() == pytest.approx(nll, rel=1e-5)
    assert terms.nll.item() < ELBO(bnn, 50)(rows, y).nll.item(), "Jensen"


def test_number_of_examples_divides_the_kl_and_nothing_else() -> None:
    bnn = network()
    x, y = batch()
    rows = bnn(x)
    losses = {n: ELBO(bnn, n)(rows, y).loss.item() for n in (10, 1000)}
    kl = bnn.kl().item()
    assert kl > 1.0
    assert losses[10] - losses[1000] == pytest.approx(kl / 10 - kl / 1000, rel=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_reduction_scales_the_kl_by_the_members(reduction: Any) -> None:
    bnn = network(kl_reduction=reduction)
    x, y = batch()
    total = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(f.loc, f.scale), torch.distributions.Normal(1.0, bnn.config.prior_scale)
        ).sum()
        for _, _, f in bnn.factors()
    )
    expected = total.item() / (K if reduction == "mean" else 1)
    assert ELBO(bnn, 50)(bnn(x), y).kl.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("annealing", "expected"),
    [(0, [1.0, 1.0, 1.0, 1.0]), (1, [1.0, 1.0, 1.0, 1.0]), (4, [0.25, 0.5, 0.75, 1.0]), (3, [1 / 3, 2 / 3, 1.0, 1.0])],
    ids=["none", "one-step", "four", "three"],
)
def test_annealing_rises_linearly_to_one(annealing: int, expected: list[float]) -> None:
    bnn = network()
    x, y = batch()
    rows = bnn(x)
    objective = ELBO(bnn, 20, annealing_steps=annealing)
    assert [objective.weight(step) for step in range(4)] == pytest.approx(expected)
    assert objective.weight(1000) == 1.0
    for step, weight in enumerate(expected):
        terms = objective(rows, y, step)
        assert terms.weight == pytest.approx(weight)
        assert terms.loss.item() == pytest.approx((terms.nll + weight * terms.kl / 20).item(), rel=1e-6)
    assert objective(rows, y).weight == 1.0


def test_partitioned_batch_is_scored_in_its_order() -> None:
    bnn = network()
    bnn.expansion = "partition"
    x, y = torch.randn(6, 6), torch.tensor([0, 1, 2, 3, 4, 0])
    rows = bnn(x)
    assert rows.shape == (6, C)
    nll = -sum(log_prob(rows[i], int(y[i])) for i in range(6)) / 6
    assert ELBO(bnn, 50)(rows, y).nll.item() == pytest.approx(nll, rel=1e-5)
    with pytest.raises(ConfigError, match="use expand='replicate'"):
        ELBO(bnn, 50, likelihood="mixture")(rows, y)


def test_labels_of_tokens() -> None:
    bnn = bayesify(nn.Linear(6, C), members=K, task="classification").train()
    y = torch.tensor([[0, 1], [2, 3]])
    rows = bnn(torch.randn(2, 2, 6))
    by_hand = -sum(log_prob(rows[k * 2 + i, t], int(y[i, t])) for k in range(K) for i in range(2) for t in range(2)) / (
        K * 4
    )
    assert ELBO(bnn, 50)(rows, y).nll.item() == pytest.approx(by_hand, rel=1e-5)


def test_the_kl_is_shared_by_all_values_of_an_example() -> None:
    """The loss times the values of an example is the bound for an example: the sum of its NLL, and KL / N."""
    bnn = bayesify(nn.Linear(6, C), members=K, task="classification").train()
    y = torch.tensor([[0, 1, 4], [2, -100, -100]])
    found = ELBO(bnn, 50)(bnn(torch.randn(2, 3, 6)), y)
    assert (found.loss * 2).item() == pytest.approx((found.nll * 2 + found.kl / 50).item(), rel=1e-6)
    values = bayesify(nn.Linear(6, 8), members=K, task="gaussian").train()
    found = ELBO(values, 50)(values(torch.randn(2, 6)), torch.randn(2, 4))
    assert (found.loss * 4).item() == pytest.approx((found.nll * 4 + found.kl / 50).item(), rel=1e-6)
    own = ELBO(bnn, 50)(SimpleNamespace(loss=torch.tensor(2.5)), values=7.0)
    assert own.loss.item() == pytest.approx(2.5 + own.kl.item() / 350, rel=1e-6)


def test_regression_is_a_normal_of_unit_variance() -> None:
    bnn = bayesify(nn.Linear(6, 1), members=K, task="regression").train()
    y = torch.randn(B)
    rows = bnn(torch.randn(B, 6))
    by_hand = sum(
        0.5 * (rows[k * B + i, 0].item() - y[i].item()) ** 2 + 0.5 * math.log(2 * math.pi)
        for k in range(K)
        for i in range(B)
    ) / (K * B)
    assert ELBO(bnn, 50)(rows, y).nll.item() == pytest.approx(by_hand, rel=1e-5)


def test_loss_of_the_models_own() -> None:
    bnn = network()
    output = SimpleNamespace(loss=torch.tensor(2.5))
    assert ELBO(bnn, 100)(output).loss.item() == pytest.approx(2.5 + bnn.kl().item() / 100)
    with pytest.raises(DataError, match="no targets and the model's output has no loss"):
        ELBO(bnn, 100)(torch.randn(K * B, C))


def test_gradient_reaches_slow_weights_and_factors() -> None:
    bnn = network()
    x, y = batch()
    ELBO(bnn, 50)(bnn(x), y).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in bnn.parameters())


@pytest.mark.parametrize(("label", "named"), [(5, "label 5"), (-1, "label -1")])
def test_label_out_of_range(label: int, named: str) -> None:
    bnn = network()
    x, y = batch()
    y[1] = label
    with pytest.raises(DataError, match=rf"{named} is out of range: the model has 5 classes \(0 to 4\)"):
        ELBO(bnn, 50)(bnn(x), y)


def test_rows_that_do_not_fit_the_targets() -> None:
    bnn = network()
    with pytest.raises(DataError, match="outputs of 10 rows do not fit 4 targets and 3 members"):
        ELBO(bnn, 50)(torch.randn(10, C), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "num_examples must be the number of training examples; found 0"),
        ({"num_examples": 5, "annealing_steps": -1}, "annealing_steps must not be negative; found -1"),
        ({"num_examples": 5, "likelihood": "sum"}, "likelihood must be 'average' or 'mixture'; found 'sum'"),
    ],
    ids=["examples", "annealing", "likelihood"],
)
def test_objective_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ELBO(network(), **options)


def test_mixture_of_regressions_by_hand() -> None:
    """−mean_b log (1/K) Σ_k N(y_b; f_k(x_b), I), a mean over the outputs."""
    torch.manual_seed(0)
    bnn = bayesify(torch.nn.Linear(3, 2), members=3, task="regression").train()
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    output = bnn(x).detach()
    normal = torch.distributions.Independent(torch.distributions.Normal(output.view(3, 4, 2), 1.0), 1)
    expected = -(normal.log_prob(y).logsumexp(0) - math.log(3)).mean() / 2
    found = ELBO(bnn, 4, likelihood="mixture")(output, y).nll
    torch.testing.assert_close(found, expected)
    average = ELBO(bnn, 4)(output, y).nll
    torch.testing.assert_close(average, -normal.log_prob(y).mean() / 2)
    assert found < average


def test_mixture_cannot_be_made_of_a_loss() -> None:
    bnn = bayesify(torch.nn.Linear(3, 2), members=2)

    class Output:
        loss = torch.ones(())

    with pytest.raises(ConfigError, match="gave its own loss"):
        ELBO(bnn, 4, likelihood="mixture")(Output())
    assert float(ELBO(bnn, 4)(Output()).nll) == 1.0


def test_kl_of_an_unloaded_model_says_so() -> None:
    bnn = bayesify(torch.nn.Linear(3, 2), members=2)
    bnn.unload()
    with pytest.raises(BayesifyError, match="this model has been unloaded"):
        bnn.kl()
