"""Embeddings with factors on their outputs, and bilinear maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

from bayesify import ConfigError, bayesify

PLAIN: dict[str, Any] = {"members": 2, "init": "normal", "init_scale": 0.5, "posterior": "deterministic"}


class Bag(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).mean(1))


def ids(rows: int = 3, high: int = 9) -> Tensor:
    return torch.randint(3, high, (rows, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("perturbation", ["multiplicative", "additive"])
@pytest.mark.parametrize("factors", ["both", "outputs"])
@torch.no_grad()
def test_members_have_rows_times_r(perturbation: str, factors: str) -> None:
    torch.manual_seed(0)
    model = Bag(padding_idx=0)
    options: dict[str, Any] = {"perturbation": perturbation, "factors": factors}
    bnn = bayesify(copy.deepcopy(model), embeddings=True, include="words", **PLAIN, **options)
    assert set(bnn.report.converted) == {"words"}
    ((name, side, factor),) = bnn.factors()
    assert (name, side, factor.size) == ("words", "r", 4)
    found = bnn.predict(ids()).outputs[:, 0]
    for member in range(2):
        expected = copy.deepcopy(model)
        r = factor.loc[member]
        rows = expected.words.weight
        rows.copy_(rows * r if perturbation == "multiplicative" else rows + r)
        torch.testing.assert_close(found[member], expected(ids()))
        torch.testing.assert_close(bnn.merge(member)(ids()), expected(ids()))
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    torch.testing.assert_close(bnn.unload()(ids()), model(ids()))


def test_only_if_asked_for() -> None:
    report = bayesify(Bag(), members=2).report
    assert set(report.converted) == {"head"}
    assert "embeddings=True" in report.skipped["words"]
    with pytest.raises(ConfigError, match="no inputs to perturb"):
        bayesify(Bag(), members=2, embeddings=True, factors="inputs")


@torch.no_grad()
def test_tied_embeddings_have_factors_apart_from_the_head() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8)).eval()
    bnn = bayesify(copy.deepcopy(model), embeddings=True, **PLAIN)
    assert {"transformer.wte", "lm_head"} <= set(bnn.report.converted)
    assert "does not carry the batch" in bnn.report.skipped["transformer.wpe"]
    assert bnn.report.tied["transformer.wte"] == ["lm_head.weight"]
    assert bnn.model.lm_head.weight is bnn.model.transformer.wte.weight
    found = bnn.predict(ids(high=20)).outputs[:, 0]
    for member in range(2):
        merged = bnn.merge(member)
        assert merged.lm_head.weight is not merged.transformer.wte.weight
        torch.testing.assert_close(merged(ids(high=20)).logits, found[member], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_embeddings_with_code_of_their_own() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20, max_position_embeddings=16, scale_embedding=True,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    inputs = {"input_ids": ids(high=20), "decoder_input_ids": ids(high=20)[:, :3]}
    bnn = bayesify(copy.deepcopy(model), embeddings=True, example_inputs=inputs, **PLAIN)
    tokens = {name for name in bnn.report.converted if "embed_tokens" in name or name == "model.shared"}
    assert tokens
    assert any("embed_positions" in name for name in bnn.report.skipped)
    found = bnn.predict(**inputs).outputs[:, 0]
    for member in range(2):
        torch.testing.assert_close(bnn.merge(member)(**inputs).logits, found[member], rtol=1e-4, atol=1e-5)


class Pair(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.pair = nn.Bilinear(4, 3, 2, bias=bias)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.pair(x, z)


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_bilinear_members(bias: bool) -> None:
    torch.manual_seed(0)
    model = Pair(bias)
    x, z = torch.randn(3, 5, 4), torch.randn(3, 5, 3)
    bnn = bayesify(copy.deepcopy(model), **PLAIN)
    factors = {side: factor.loc for _, side, factor in bnn.factors()}
    found = bnn.predict(x, z).outputs[:, 0]
    for member in range(2):
        expected = copy.deepcopy(model)
        s, r = factors["s"][member], factors["r"][member]
        expected.pair.weight.copy_(torch.einsum("oij,o,i->oij", expected.pair.weight, r, s))
        torch.testing.assert_close(found[member], expected(x, z), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bnn.merge(member)(x, z), expected(x, z), rtol=1e-4, atol=1e-5)
