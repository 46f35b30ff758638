"""Attention of torch.nn: the same numbers as torch's own, for every mask and layout, and factors in the projections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify import bayesify

N, L, S, E, H = 3, 4, 5, 8, 2


class Caller(nn.Module):
    """Calls attention as told; the output and the weights stand side by side."""

    def __init__(self, attention: nn.MultiheadAttention, self_attention: bool, options: dict[str, Any]) -> None:
        super().__init__()
        self.attention, self.self_attention, self.options = attention, self_attention, options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        inputs = [query] * 3 if self.self_attention else [query, key, value]
        if not self.attention.batch_first:
            inputs = [inputs[0].transpose(0, 1)] * 3 if self.self_attention else [x.transpose(0, 1) for x in inputs]
        rows = len(query)
        masks = {name: mask(rows) if callable(mask) else mask for name, mask in self.options.items()}
        output, weights = self.attention(*inputs, **masks)
        output = output if self.attention.batch_first else output.transpose(0, 1)
        return output.flatten(1) if weights is None else torch.cat([output.flatten(1), weights.flatten(1)], 1)


def padding(rows: int) -> Tensor:
    return torch.arange(S) >= torch.tensor([5, 3, 4]).repeat(rows // N)[:, None]


def own_mask(rows: int) -> Tensor:
    """Boolean [rows · H, L, S], other for every example and head."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(N * H, L, S, generator=generator) > 0.7
    return (mask & (torch.arange(S) > 0)).repeat(rows // N, 1, 1)


LAYERS = {
    "packed": {},
    "no-bias": {"bias": False},
    "separate": {"kdim": 6, "vdim": 7},
    "extra-keys": {"add_bias_kv": True, "add_zero_attn": True},
    "separate-extra-keys": {"kdim": 6, "vdim": 7, "bias": False, "add_bias_kv": True},
}
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-weights": {"need_weights": False},
    "each-head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": padding},
    "padding-no-weights": {"key_padding_mask": padding, "need_weights": False},
    "float-mask": {"attn_mask": torch.linspace(-2, 2, L * S).view(L, S)},
    "both-masks": {"attn_mask": torch.ones(L, S).triu(2).bool(), "key_padding_mask": padding, "need_weights": False},
    "own-mask": {"attn_mask": own_mask},
    "causal": {"attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True, "need_weights": False},
    "causal-padding": {
        "attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True, "key_padding_mask": padding,
    },
}  # fmt: skip


def make(layer: dict[str, Any], call: dict[str, Any], batch_first: bool, self_attention: bool = False) -> nn.Module:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, H, batch_first=batch_first, **layer)
    for name, parameter in attention.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return Caller(attention, self_attention, call).eval()


def inputs(layer: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, L, E), torch.randn(N, S, layer.get("kdim", E)), torch.randn(N, S, layer.get("vdim", E))


def scaled(model: nn.Module, bnn: Any, member: int) -> nn.Module:
    """The plain network with W ∘ (r sᵀ) of one member."""
    reference = copy.deepcopy(model)
    factors = {(name, side): factor.loc[member].detach() for name, side, factor in bnn.factors()}
    for name in bnn.report.converted:
        weight = reference.get_parameter(name if name.endswith("weight") else f"{name}.weight")
        with torch.no_grad():
            weight.mul_(torch.outer(factors[name, "r"], factors[name, "s"]))
    return reference


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "time-first"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@torch.no_grad()
def test_members_equal_attention_with_scaled_weights(layer: Any, call: Any, batch_first: bool) -> None:
    model = make(layer, call, batch_first)
    x = inputs(layer)
    base = model(*x)
    bnn = bayesify(copy.deepcopy(model), members=2, init="normal", init_scale=0.5, posterior="deterministic")
    kernels = {"in_proj_weight"} if layer.get("kdim") is None else {f"{n}_proj_weight" for n in "qkv"}
    assert set(bnn.report.converted) == {f"attention.{name}" for name in (*kernels, "out_proj")}
    assert not bnn.report.skipped
    found = bnn.predict(*x).outputs[:, 0]
    for member in range(2):
        expected = scaled(model, bnn, member)(*x)
        torch.testing.assert_close(found[member], expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, base, atol=1e-2)
        torch.testing.assert_close(bnn.merge(member)(*x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bnn.unload()(*x), base)


@pytest.mark.parametrize("call", ["plain", "no-weights"])
@torch.no_grad()
def test_self_attention_multiplies_once(call: str) -> None:
    model = make({}, CALLS[call], batch_first=True, self_attention=True)
    x = inputs({})
    bnn = bayesify(copy.deepcopy(model), members=2, init="normal", init_scale=0.5, posterior="deterministic")
    found = bnn.predict(*x).outputs[:, 0]
    for member in range(2):
        torch.testing.assert_close(found[member], scaled(model, bnn, member)(*x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [True, False])
def test_dropout_follows_the_same_random_numbers(weights: bool) -> None:
    torch.manual_seed(0)
    model = Caller(nn.MultiheadAttention(E, H, dropout=0.4, batch_first=True), True, {"need_weights": weights})
    x = inputs({})
    bnn = bayesify(copy.deepcopy(model), members=1, init="ones", posterior="deterministic")
    torch.manual_seed(5)
    expected = model(*x)
    torch.manual_seed(5)
    torch.testing.assert_close(bnn(*x), expected, rtol=1e-5, atol=1e-6)


def test_unbatched_query_goes_through_the_network_itself() -> None:
    attention = nn.MultiheadAttention(E, H)
    x = torch.randn(L, E)
    expected, weights = attention(x, x, x, key_padding_mask=torch.arange(L) > 2)
    network = bayesify(attention, members=2, init="ones", posterior="deterministic").model
    output, found = network(x, x, x, key_padding_mask=torch.arange(L) > 2)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(found, weights)


def test_member_biases_of_attention() -> None:
    model = make({}, {"need_weights": False}, batch_first=True)
    x = inputs({})
    bnn = bayesify(copy.deepcopy(model), members=2, posterior="deterministic", member_bias=True)
    for name, parameter in bnn.model.named_parameters():
        if name.endswith("own_bias.offset"):
            nn.init.normal_(parameter)
    with torch.no_grad():
        found = bnn.eval().predict(*x).outputs[:, 0]
        for member in range(2):
            torch.testing.assert_close(found[member], bnn.merge(member)(*x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[1])


def test_out_projection_alone_is_not_converted() -> None:
    bnn = bayesify(nn.Sequential(Attentive(), nn.Linear(E, 2)), members=2, exclude="0.attention")
    assert set(bnn.report.converted) == {"1"}
    bnn = bayesify(nn.Sequential(Attentive(), nn.Linear(E, 2)), members=2, include=("0.attention.out_proj", "1"))
    assert set(bnn.report.converted) == {"1"}
    assert "without calling" in bnn.report.skipped["0.attention.out_proj"]


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].mean(1)


class OwnForward(nn.MultiheadAttention):
    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(query.tanh(), *args, **kwargs)


def test_subclass_with_a_forward_of_its_own_is_skipped_with_reasons() -> None:
    model = nn.Sequential(nn.Linear(4, E), Attentive(), nn.Linear(E, 2))
    model[1].attention = OwnForward(E, H, batch_first=True)
    bnn = bayesify(model, members=2)
    assert set(bnn.report.converted) == {"0", "2"}
    assert set(bnn.report.skipped) == {"1.attention.out_proj", "1.attention.in_proj_weight"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_fused_kernels_are_back_after_unload() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2).eval()
    types = [type(module) for module in model.modules()]
    x, mask = torch.randn(N, S, E), padding(N)
    expected = model(x, src_key_padding_mask=mask)
    bnn = bayesify(model, members=2, init="normal", init_scale=0.5, posterior="deterministic")
    first, second = bnn.eval().predict(x, src_key_padding_mask=mask).outputs[:, 0]
    assert not torch.allclose(first[:, :3], second[:, :3], atol=1e-2)
    assert torch.backends.mha.get_fastpath_enabled()
    assert [type(module) for module in bnn.unload().modules()] == types
    torch.testing.assert_close(model(x, src_key_padding_mask=mask), expected)
