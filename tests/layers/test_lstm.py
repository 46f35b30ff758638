"""The folded weights of an LSTM's members, kept from call to call where they come again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify import BayesianModel, bayesify
from bayesify.layers import lstm
from bayesify.layers.made import made_of_parameters

K, N, T, IN, HIDDEN = 3, 4, 6, 5, 8


class Network(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = nn.LSTM(IN, HIDDEN, batch_first=True, **options)
        self.head = nn.Linear(self.lstm.hidden_size * (2 if self.lstm.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that all weights of a draw were packed."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    found: list[int] = []
    real = lstm.pack
    monkeypatch.setattr(lstm, "pack", lambda layer: found.append(1) or real(layer))
    return found


def converted(**options: Any) -> tuple[BayesianModel, Tensor]:
    torch.manual_seed(0)
    bnn = bayesify(Network(**options), members=K, example_inputs=torch.randn(2, T, IN)).eval()
    with torch.no_grad():
        for _, _, factor in bnn.factors():
            factor.loc.normal_(1, 0.3)
    return bnn, torch.randn(N, T, IN)


def by_hand(bnn: BayesianModel, x: Tensor) -> Tensor:
    """[K, N, 2] outputs of the networks with each member's factors folded into their weights."""
    return torch.stack([bnn.merge(member=k)(x) for k in range(K)])


def members(bnn: BayesianModel, x: Tensor, **options: Any) -> Tensor:
    return bnn.predict(x, **options).outputs[:, 0]


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("chunk", [1, K])
@torch.no_grad()
def test_packed_once_for_all_members(options: dict[str, Any], chunk: int, packings: list[int]) -> None:
    bnn, x = converted(**options)
    first = members(bnn, x, member_chunk=chunk)
    torch.testing.assert_close(first, by_hand(bnn, x))
    assert len(packings) == K
    assert torch.equal(members(bnn, x, member_chunk=chunk), first)
    torch.testing.assert_close(members(bnn, x[:1], member_chunk=chunk), by_hand(bnn, x[:1]))
    assert len(packings) == K
    torch.testing.assert_close(members(copy.deepcopy(bnn), x), first)
    assert len(packings) == 2 * K


CHANGES: dict[str, Callable[[nn.LSTM], object]] = {
    "weight in place": lambda layer: layer.weight_hh_l0.mul_(2),
    "weight by .data": lambda layer: layer.weight_ih_l0.data.mul_(2),
    "element by .data": lambda layer: layer.weight_hh_l0.data[3, 2].add_(1),
    "bias by .data": lambda layer: layer.bias_hh_l0.data.add_(1),
    "another weight": lambda layer: setattr(layer, "weight_hh_l0", nn.Parameter(-layer.weight_hh_l0)),
    "factor by .data": lambda layer: layer.rank1["weight_hh_l0"].s.loc.data[1].mul_(2),  # type: ignore[index, union-attr]
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_whatever_changes_is_seen(change: str, packings: list[int]) -> None:
    bnn, x = converted()
    before = members(bnn, x)
    CHANGES[change](bnn.model.lstm)
    found = members(bnn, x)
    assert not torch.allclose(found, before)
    torch.testing.assert_close(found, by_hand(bnn, x))
    assert torch.equal(members(bnn, x), found)
    assert len(packings) == K + (1 if change.startswith("factor") else K)


@torch.no_grad()
def test_a_bias_of_each_member_is_seen(packings: list[int]) -> None:
    torch.manual_seed(0)
    bnn, x = bayesify(Network(), members=K, member_bias=True).eval(), torch.randn(N, T, IN)
    before = members(bnn, x)
    bnn.model.lstm.rank1["weight_hh_l0"].own_bias.offset.data[1].add_(1)
    found = members(bnn, x)
    assert [torch.allclose(a, b) for a, b in zip(before, found, strict=True)] == [True, False, True]
    torch.testing.assert_close(found, by_hand(bnn, x))
    assert len(packings) == K + 1


def test_random_draws_and_gradients_are_not_packed(packings: list[int]) -> None:
    bnn, x = converted()
    bnn.predict(x, samples=2, seed=0)
    for _, parameter in bnn.slow_parameters():
        parameter.requires_grad_(False)
    bnn(x).square().sum().backward()  # of the factors alone, in eval mode
    assert all(bool(factor.loc.grad.any()) for _, _, factor in bnn.factors())
    assert not packings


@torch.no_grad()
def test_large_weights_are_not_kept(packings: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    bnn, x = converted()
    size = K * 4 * sum(parameter.numel() for parameter in Network().lstm.parameters())
    for most, count in ((size - 1, 0), (size, K)):
        monkeypatch.setattr(lstm, "KEPT_BYTES", most)
        torch.testing.assert_close(members(bnn, x), by_hand(bnn, x))
        assert len(packings) == count


@torch.no_grad()
def test_members_that_are_the_same_are_packed_once(packings: list[int]) -> None:
    bnn, x = converted()
    for _, _, factor in bnn.factors():
        factor.loc.copy_(factor.loc[0].clone())
    for _ in range(2):
        torch.testing.assert_close(members(bnn, x), by_hand(bnn, x))
    assert len(packings) == 1


@torch.no_grad()
def test_no_more_than_the_members_are_kept(packings: list[int]) -> None:
    bnn, x = converted()
    layer = bnn.model.lstm
    for _ in range(4):
        layer.rank1["weight_hh_l0"].s.loc.mul_(1.1)
        torch.testing.assert_close(members(bnn, x), by_hand(bnn, x))
    assert len(made_of_parameters(layer, lstm.Kept).packed) == K
    assert len(packings) == 4 * K
