"""Mixtures of experts of transformers: fused weights, factors of each expert's own, each token with its row's draw."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bayesify import BayesianModel, BayesifyError, ConversionError, bayesify

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "head_dim": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}),
    "gpt-oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2}),
    "llama4": ("Llama4Text", {"num_local_experts": 3, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1}),
}


def build(name: str) -> Any:
    family, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options, pad_token_id=0)
    cls = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
    model = cls(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens() -> Tensor:
    return torch.randint(0, 50, (3, 6), generator=torch.Generator().manual_seed(1))


def scaled(model: nn.Module, bnn: BayesianModel, member: int) -> nn.Module:
    """The plain model with every expert's matrix times its r sᵀ, one after the other."""
    reference = copy.deepcopy(model)
    modules, parameters = dict(reference.named_modules()), dict(reference.named_parameters())
    factors = {(name, side): factor.loc[member].detach() for name, side, factor in bnn.factors()}
    for name in bnn.report.converted:
        r, s = factors[name, "r"], factors[name, "s"]
        with torch.no_grad():
            if name in modules:
                modules[name].weight.mul_(torch.outer(r, s))  # type: ignore[operator]
                continue
            weight = parameters[name]
            if weight.dim() == 2:
                weight.mul_(torch.outer(r, s))
                continue
            for expert in range(len(weight)):
                outer = torch.outer(r.view(len(weight), -1)[expert], s.view(len(weight), -1)[expert])
                weight[expert] *= outer if outer.shape == weight[expert].shape else outer.T
    return reference


KINDS = [(name, kind) for name in MODELS for kind in ("eager", "batched_mm", "grouped_mm")]


@pytest.mark.parametrize(("name", "implementation"), [pair for pair in KINDS if pair[0] != "llama4"] + [KINDS[-3]])
@torch.no_grad()
def test_members_equal_experts_with_scaled_weights(name: str, implementation: str) -> None:
    model = build(name)
    model.config._experts_implementation = implementation
    x = tokens()
    base = model(x).logits
    bnn = bayesify(copy.deepcopy(model), members=2, init="normal", posterior="deterministic")
    fused = [name for name, p in model.named_parameters() if p.dim() == 3]
    assert fused
    assert set(fused) <= set(bnn.report.converted)
    found = bnn.predict(x).outputs[:, 0]
    for member in range(2):
        expected = scaled(model, bnn, member)(x).logits
        torch.testing.assert_close(found[member], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(bnn.merge(member)(x).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, base, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_draws_of_each_example_stay_with_it(name: str) -> None:
    bnn = bayesify(build(name).double(), members=2, posterior_scale=0.3)
    x = tokens()
    outputs = bnn.predict(x, samples=2, seed=0).outputs
    x[1] = torch.randint(0, 50, (6,), generator=torch.Generator().manual_seed(2))
    other = bnn.predict(x, samples=2, seed=0).outputs
    torch.testing.assert_close(other[:, :, [0, 2]], outputs[:, :, [0, 2]])
    assert not torch.allclose(other[:, :, 1], outputs[:, :, 1], atol=1e-2)


def test_member_biases_and_gradients() -> None:
    bnn = bayesify(build("gpt-oss"), members=2, member_bias=True, posterior="deterministic", init="normal")
    network: Any = bnn.model
    experts = network.model.layers[0].mlp.experts
    for site in experts.rank1.values():
        nn.init.normal_(site.own_bias.offset)
    x = tokens()
    with torch.no_grad():
        found = bnn.eval().predict(x).outputs[:, 0]
        for member in range(2):
            torch.testing.assert_close(bnn.merge(member)(x).logits, found[member], rtol=1e-4, atol=1e-4)
    bnn.train()(x).logits.square().mean().backward()
    for parameter in experts.rank1.parameters():
        assert bool((parameter.grad.abs().sum(1) > 0).all())


def test_what_is_refused() -> None:
    bnn = bayesify(build("mixtral"), members=2, perturbation="additive", include="model.layers.0.mlp.experts")
    with pytest.raises(ConversionError, match="experts"):
        bnn.merge()
    bnn = bayesify(build("mixtral"), members=2)
    network: Any = bnn.model
    experts = network.model.layers[0].mlp.experts
    for factor in (experts.rank1["down_proj"].s, experts.rank1["gate_up_proj"].s):
        factor.hold(torch.ones(2, factor.size))
    with pytest.raises(BayesifyError, match="no multiple"):
        experts(torch.randn(3, 16), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
