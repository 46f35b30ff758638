"""Layers that compute the same in less time: LSTMs whose weights are packed once, and convolutions as products."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from bayesify.layers import PackedLSTM, PointwiseConv2d, pointwise, speed_up

IN, HIDDEN, N, T = 5, 8, 3, 6
KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "layers": {"num_layers": 3, "dropout": 0.5},
    "both-ways": {"num_layers": 2, "bidirectional": True},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True, "num_layers": 2, "bidirectional": True},
}


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    real = torch.mkldnn_rnn_layer

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(torch, "mkldnn_rnn_layer", counted)
    return calls


def both(**options: Any) -> tuple[nn.LSTM, PackedLSTM]:
    torch.manual_seed(0)
    plain = nn.LSTM(IN, HIDDEN, **options).eval()
    packed: Any = copy.deepcopy(plain)
    packed.__class__ = PackedLSTM
    return plain, packed


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    return all(same(a, b) for a, b in zip(found, expected, strict=True) if b is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
@torch.no_grad()
def test_the_same_digits(kind: str, given: bool, packed_calls: list[int]) -> None:
    plain, packed = both(**KINDS[kind])
    rows = len(plain.all_weights)
    for count, steps in ((N, T), (1, 1), (40, 2)):
        x = torch.randn(count, steps, IN) if plain.batch_first else torch.randn(steps, count, IN)
        state = (torch.randn(rows, count, HIDDEN), torch.randn(rows, count, HIDDEN)) if given else None
        assert same(packed(x, state), plain(x, state))
    assert len(packed_calls) == 3 * rows


@torch.no_grad()
def test_changed_weights_are_packed_anew(packed_calls: list[int]) -> None:
    plain, packed = both()
    x = torch.randn(T, N, IN)
    before = packed(x)[0]
    for layer in (plain, packed):
        layer.weight_hh_l0.mul_(2)
    assert torch.equal(packed(x)[0], plain(x)[0])
    assert not torch.equal(packed(x)[0], before)
    for layer in (plain, packed):
        layer.weight_ih_l0 = nn.Parameter(torch.ones(4 * HIDDEN, IN))
    assert torch.equal(packed(x)[0], plain(x)[0])
    for again in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(again(x)[0], plain(x)[0])
    assert len(packed_calls) == 6


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_all_else_is_torchs_own(packed_calls: list[int]) -> None:
    plain, packed = both()
    x = torch.randn(T, N, IN)
    assert same(packed(x), plain(x))  # with gradients
    assert packed(x)[0].requires_grad
    with torch.no_grad():
        together = pack_padded_sequence(x, torch.tensor([6, 4, 2]))
        assert same(packed(together), plain(together))
        assert same(packed(x[:, 0]), plain(x[:, 0]))
        assert same(packed.double()(x.double()), plain.double()(x.double()))
    projected, other = both(proj_size=4)
    with torch.no_grad():
        assert same(other(x), projected(x))
    assert not packed_calls
    _, packed = both()
    with torch.no_grad():
        for wrong in (torch.randn(T, N, IN + 1), torch.randn(T, N, IN, 1)):
            with pytest.raises((RuntimeError, ValueError)):
                packed(wrong)
        with pytest.raises(RuntimeError, match="hidden"):
            packed(x, (torch.zeros(1, N + 1, HIDDEN), torch.zeros(1, N + 1, HIDDEN)))


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
def test_export_is_of_a_plain_one() -> None:
    plain, packed = both(batch_first=True)
    x = torch.randn(N, T, IN)
    with torch.no_grad():
        packed(x)
        exported = torch.export.export(packed, (x,))
        assert "mkldnn" not in str(exported.graph)
        torch.testing.assert_close(exported.module()(x)[0], plain(x)[0])


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_convolutions_of_one_by_one(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 1, bias=bias)
    faster = copy.deepcopy(plain)
    assert speed_up(faster) == 1
    assert type(faster) is PointwiseConv2d
    calls: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args, **options: calls.append(1) or bmm(*args, **options))
    x = torch.randn(3, 4, 9, 8)
    torch.testing.assert_close(faster(x), plain(x))
    assert not calls, "laying small images out anew costs little"
    monkeypatch.setattr(pointwise, "LARGE_BYTES", 1)
    torch.testing.assert_close(faster(x), plain(x))
    assert len(calls) == 1
    for other in (x[..., :1, :1], x.to(memory_format=torch.channels_last), x.to(torch.float64), x[0]):
        torch.testing.assert_close(faster.to(other.dtype)(other), plain.to(other.dtype)(other))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 1, stride=2), nn.Conv2d(4, 6, 1, padding=1), nn.Conv2d(4, 6, 1, groups=2),
     nn.Conv1d(4, 6, 1)],
    ids=str,
)  # fmt: skip
def test_other_convolutions_stay(layer: nn.Module) -> None:
    kind = type(layer)
    assert speed_up(layer) == 0
    assert type(layer) is kind
