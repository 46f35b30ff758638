"""Experts that are called one by one, each with the tokens that were sent to it: every token has its row's draw."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import BayesianModel, bayesify

K = 3


class Mixture(nn.Module):
    """A gate and experts, as models with code of their own have them."""

    def __init__(self, experts: int, mask: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(6, experts)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(experts))
        self.shared = nn.Linear(6, 6)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weight, chosen = self.gate(tokens).softmax(-1).topk(2)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == number)
            taken = tokens[(chosen == number).any(-1)] if self.mask else tokens[token]
            output.index_add_(0, token, expert(taken) * weight[token, slot, None])
        return (output + self.shared(tokens)).view_as(x)


class SortedExperts(nn.Module):
    """The weights of all experts, which get tokens sorted by expert."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.number = experts
        self.up = nn.Parameter(torch.randn(experts, 8, 6) / 3)
        self.down = nn.Parameter(torch.randn(experts, 6, 4) / 3)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        pieces, found = x.split(sizes, dim=0), []
        for expert in range(self.number):
            gate, value = F.linear(pieces[expert], self.up[expert]).chunk(2, dim=-1)
            found.append(F.linear(gate.sigmoid() * value, self.down[expert]))
        return torch.cat(found)


class SortingMixture(nn.Module):
    """Sorts tokens by expert, and is called by a method of another name than forward."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, experts), SortedExperts(experts)

    def mix(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weight, chosen = self.gate(tokens).softmax(-1).topk(2)
        order = chosen.flatten().argsort(stable=True)
        sizes = chosen.flatten().bincount(minlength=self.gate.out_features).tolist()
        found = self.experts(tokens[order // 2], sizes) * weight.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, order // 2, found).view_as(x)


class Sorting(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.inner = SortingMixture(experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.mix(x)


class Network(nn.Module):
    def __init__(self, experts: int, kind: str) -> None:
        super().__init__()
        mixture = Sorting(experts) if kind == "sorted" else Mixture(experts, kind == "mask")
        self.first, self.mixture, self.head = nn.Linear(5, 6), mixture, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixture(self.first(x)).mean(1))


def members_of(bnn: BayesianModel, *inputs: Any, **named: Any) -> list[Any]:
    with torch.no_grad():
        return [bnn.merge(k)(*inputs, **named) for k in range(K)]


@pytest.mark.parametrize("kind", ["places", "mask", "sorted"])
@pytest.mark.parametrize(("experts", "length"), [(2, 4), (4, 5), (6, 3)])
def test_members_are_exact(experts: int, length: int, kind: str) -> None:
    """With two experts each gets every token: as many as there are, and in their order."""
    torch.manual_seed(0)
    bnn = bayesify(Network(experts, kind), members=K, init_scale=0.5, task="regression").eval()
    assert not bnn.report.skipped
    x = torch.randn(4, length, 5)
    expected = torch.stack(members_of(bnn, x))
    torch.testing.assert_close(bnn.predict(x).outputs[:, 0], expected, atol=1e-5, rtol=1e-4)
    bnn.train()
    with torch.no_grad():
        for _, _, factor in bnn.factors():
            factor.loc.fill_(1.0)
    base = copy.deepcopy(bnn).unload().eval()
    torch.testing.assert_close(bnn.eval()(x), base(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["places", "sorted"])
def test_each_example_has_its_own_draw(kind: str) -> None:
    """Moving one example's input leaves the draws of the others where they are."""
    torch.manual_seed(0)
    bnn = bayesify(Network(4, kind), members=K, posterior_scale=0.3, task="regression").eval()
    x = torch.randn(4, 5, 5)
    before = bnn.predict(x, samples=2, seed=3).outputs
    x[1] += 1.0
    after = bnn.predict(x, samples=2, seed=3).outputs
    others = [0, 2, 3]
    torch.testing.assert_close(after[:, :, others], before[:, :, others], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(after[:, :, 1], before[:, :, 1], atol=1e-2)


def test_experts_without_tokens_keep_their_factors() -> None:
    """Where nothing comes in, nothing grows with the batch."""
    network = Network(4, "places")
    assert isinstance(network.mixture, Mixture)
    nn.init.zeros_(network.mixture.gate.weight)
    network.mixture.gate.bias.data = torch.tensor([1.0, 1.0, 0.0, 0.0])
    bnn = bayesify(network, members=K)
    bnn.report.unsettled = True
    bnn.predict(torch.randn(4, 5, 5))
    assert not bnn.report.skipped


def test_copies_and_the_original() -> None:
    torch.manual_seed(0)
    model = Network(4, "places")
    bnn = bayesify(model, members=K, init_scale=0.5, task="regression").eval()
    x = torch.randn(4, 5, 5)
    for twin in (copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))):
        torch.testing.assert_close(twin(x), bnn(x))
    assert isinstance(bnn.mixture, Mixture)
    assert type(bnn.unload().mixture) is Mixture  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["SwitchTransformers", "NllbMoe"])
def test_experts_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    if name == "NllbMoe":
        small: dict[str, Any] = {
            "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
            "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
        }  # fmt: skip
    else:
        small = {"d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2, "num_sparse_encoder_layers": 1,
                 "num_decoder_layers": 2, "num_sparse_decoder_layers": 1, "expert_capacity": 64}  # fmt: skip
    config = getattr(transformers, f"{name}Config")(vocab_size=40, d_model=16, num_experts=4, **small)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    bnn = bayesify(model.eval(), members=K, init_scale=0.3)
    assert any("expert_" in site for site in bnn.report.converted)
    inputs = {"input_ids": torch.randint(3, 40, (4, 7)), "decoder_input_ids": torch.randint(3, 40, (4, 3))}
    expected = torch.stack([member.logits for member in members_of(bnn, **inputs)])
    torch.testing.assert_close(bnn.predict(**inputs).outputs[:, 0], expected, atol=1e-3, rtol=1e-3)
