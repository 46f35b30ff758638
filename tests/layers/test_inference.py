"""Layers that compute the same in less time: with weights that are packed once, and convolutions as products."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from bayesify.layers import PackedConv2d, PackedLinear, PackedLSTM, inference, pointwise, speed_up

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
    assert type(faster) is PackedConv2d
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
    [nn.Conv2d(4, 6, 3, padding="same"), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.Conv1d(4, 6, 1)],
    ids=str,
)
def test_other_convolutions_stay(layer: nn.Module) -> None:
    kind = type(layer)
    assert speed_up(layer) == 0
    assert type(layer) is kind


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(12, 9), (5, 12)),
    "dense, no bias": (lambda: nn.Linear(12, 9, bias=False), (2, 3, 12)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 6)),
    "convolution, no bias": (
        lambda: nn.Conv2d(4, 6, (3, 1), padding=(1, 0), dilation=(2, 1), bias=False),
        (2, 4, 5, 6),
    ),
    "convolution, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 6)),
    "convolution, 1 x 1": (lambda: nn.Conv2d(4, 6, 1), (3, 4, 5, 6)),
}


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Weights are packed however small, on whatever processor; gives how often."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(inference, "has_onednn", lambda: True)
    monkeypatch.setattr(inference, "WEIGHT", 1)
    monkeypatch.setattr(inference, "SHARE_OF_DENSE", 0.01)
    monkeypatch.setattr(inference, "SHARE_OF_CONVOLUTION", 0.01)
    calls: list[int] = []
    for kind in ("linear", "convolution"):
        real = getattr(torch.ops.mkldnn, f"_reorder_{kind}_weight")
        noted = lambda *args, real=real: calls.append(1) or real(*args)  # noqa: E731
        monkeypatch.setattr(torch.ops.mkldnn, f"_reorder_{kind}_weight", noted)
    return calls


def plain_and_packed(name: str) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    plain = build()
    faster = copy.deepcopy(plain)
    assert speed_up(faster) == 1
    return plain, faster, torch.randn(shape)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_packed_once_for_the_same_weights(name: str, packed: list[int]) -> None:
    plain, faster, x = plain_and_packed(name)
    assert isinstance(faster, (PackedLinear, PackedConv2d))
    for value in (x, torch.cat([x, x]), x[:1].repeat(7, *[1] * (x.dim() - 1))):
        found = faster(value)
        torch.testing.assert_close(found, plain(value))
        assert found.is_contiguous(), "networks look at it in another shape"
    assert len(packed) == 1
    for layer in (plain, faster):
        layer.weight.mul_(2)
    torch.testing.assert_close(faster(x), plain(x))
    assert len(packed) == 2
    for layer in (plain, faster):
        layer.weight = nn.Parameter(torch.ones_like(layer.weight))
    torch.testing.assert_close(faster(x), plain(x))
    assert len(packed) == 3
    for again in (copy.deepcopy(faster), pickle.loads(pickle.dumps(faster))):
        torch.testing.assert_close(again(x), plain(x))
    assert len(packed) == 5


@pytest.mark.parametrize("name", LAYERS)
def test_packed_for_nothing_else(name: str, packed: list[int]) -> None:
    plain, faster, x = plain_and_packed(name)
    torch.testing.assert_close(faster(x), plain(x))  # with gradients
    assert faster(x).requires_grad
    with torch.no_grad():
        others = [x[:0], x.double(), x[:1] if x.dim() == 2 else x[0]]  # nothing, precise, a single row or no batch
        if x.dim() == 4:
            others.append(x.to(memory_format=torch.channels_last))
        for other in others:
            found = faster.to(other.dtype)(other)
            expected = plain.to(other.dtype)(other)
            torch.testing.assert_close(found, expected)
            assert found.stride() == expected.stride()
            plain.float(), faster.float()
        exported = torch.export.export(faster, (x,))
        assert "mkldnn" not in str(exported.graph)
        with torch.inference_mode():
            inside = copy.deepcopy(faster)
            torch.testing.assert_close(inside(x), plain(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(faster(x), plain(x))
        for wrong in (torch.randn(8, 7), torch.randn(2, 5, 8, 8)):
            with pytest.raises(RuntimeError, match=r"cannot be multiplied|Given groups|Expected 3D"):
                faster(wrong)
    assert not packed


@torch.no_grad()
def test_few_rows_and_a_large_weight_are_packed(packed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WEIGHT", 1 << 18), ("SHARE_OF_DENSE", 6), ("SHARE_OF_CONVOLUTION", 2)):
        monkeypatch.setattr(inference, name, value)
    layers: list[tuple[nn.Module, list[Tensor], list[Tensor]]] = [
        (
            nn.Linear(512, 1024),
            [torch.randn(4, 512), torch.randn(2, 28, 512)],
            [torch.randn(3, 512), torch.randn(57, 512)],
        ),
        (nn.Linear(512, 256), [], [torch.randn(4, 512)]),
        (nn.Conv2d(256, 256, 3, padding=1), [torch.randn(2, 256, 16, 16)], [torch.randn(3, 256, 16, 16)]),
        (nn.Conv2d(512, 1024, 1), [torch.randn(1, 512, 2, 2)], [torch.randn(1, 512, 1, 1)]),
    ]
    for layer, few, others in layers:
        speed_up(layer)
        for x in others:
            layer(x)
        assert not packed
        for x in few:
            layer(x)
        assert len(packed) == bool(few)
        packed.clear()
    monkeypatch.setattr(inference, "has_onednn", lambda: False)
    copy.deepcopy(layers[0][0])(layers[0][1][0])
    assert not packed


@torch.no_grad()
def test_a_state_that_is_none_is_an_error_of_torch() -> None:
    plain, packed = both()
    found = []
    for layer in (plain, packed):
        with pytest.raises(IndexError) as error:
            layer(torch.randn(T, N, IN), torch.zeros(1, N, HIDDEN))  # type: ignore[arg-type]
        found.append(str(error.value))
    assert found[0] == found[1]
