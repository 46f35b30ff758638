"""A compiler sees one graph of the network, whatever is drawn."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify import BayesianModel, bayesify
from tests.models import CASES, Case, tensor

NAMES = ("mlp", "cnn", "vit_tiny", "bert", "llama", "torch_transformer")
STEPS = 3


class Graphs:
    """A backend that keeps the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.found: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.found.append(graph)
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def converted(case: Case) -> BayesianModel:
    return bayesify(case.model(), members=2, posterior_scale=0.1)


def compiled(bnn: BayesianModel, graphs: Graphs, whole: bool) -> Any:
    if whole:
        return torch.compile(bnn, backend=graphs)
    bnn.compile(backend=graphs, fullgraph=True)
    return bnn


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in place"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
def test_training_compiles_one_graph_for_all_draws(case: Case, whole: bool) -> None:
    graphs = Graphs()
    bnn = converted(case).train()
    model = compiled(bnn, graphs, whole)
    args, kwargs = case.example()
    outputs = []
    for _ in range(STEPS):
        output = tensor(model(*args, **kwargs))
        output.square().mean().backward()
        outputs.append(output.detach())
    assert len(graphs.found) == 1
    assert not torch.equal(outputs[0], outputs[1])  # drawn anew at each step
    assert all(factor.loc.grad is not None for _, _, factor in bnn.factors())


@pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
@torch.no_grad()
def test_predicting_compiles_one_graph_for_all_draws(case: Case) -> None:
    graphs = Graphs()
    bnn = converted(case).eval()
    args, kwargs = case.example()
    expected = bnn.predict(*args, samples=STEPS, seed=0, member_chunk=1, **kwargs).outputs
    bnn.compile(backend=graphs, fullgraph=True)
    found = bnn.predict(*args, samples=STEPS, seed=0, member_chunk=1, **kwargs).outputs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert len(graphs.found) == 1


class Parted(nn.Module):
    """A stem that members share, and a head that they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))


@torch.no_grad()
def test_members_part_late_in_a_compiled_network() -> None:
    graphs = Graphs()
    bnn = bayesify(Parted(), members=3, include=("head",)).eval()
    x = torch.randn(4, 6)
    expected = bnn(x)
    rows: list[int] = []
    bnn.compile(backend=graphs, fullgraph=True)
    for _ in range(STEPS):
        torch.testing.assert_close(bnn(x), expected)
    assert len(graphs.found) == 1
    for node in graphs.found[0].graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and value.shape[1:] == (8,) and node.op == "call_function":
            rows.append(value.shape[0])
    assert rows[0] == 4  # the stem's


def test_members_part_in_a_pass_only() -> None:
    """After training, parts of the network that are called by themselves get their own rows, however many."""
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    bnn = bayesify(network, members=4, sites="2")
    x = torch.randn(5, 4)
    bnn.train()
    assert bnn(x).shape == (20, 3)
    bnn.eval()
    assert bnn.model(x).shape == (5, 3)
    assert bnn.model(x[:2]).shape == (2, 3)


def test_a_look_at_inputs_with_a_state_waits_for_plain_ones() -> None:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bnn = bayesify(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), members=2).eval()
    bnn.report.unsettled = True
    cache = DynamicCache()
    bnn(input_ids=torch.randint(50, (2, 5)), past_key_values=cache, use_cache=True)
    assert bnn.report.unsettled
    assert cache.get_seq_length() == 5
    bnn(input_ids=torch.randint(50, (2, 5)))
    assert not bnn.report.unsettled


class FirstToken(nn.Module):
    """Gives a slice of what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[:, 0]


@pytest.mark.parametrize("model", [FirstToken(), nn.Linear(4, 3)], ids=["slice", "whole"])
@pytest.mark.parametrize("options", [{}, {"member_chunk": 1}, {"samples": 2, "seed": 0}], ids=str)
def test_predictions_keep_no_more_memory_than_they_fill(model: nn.Module, options: dict[str, Any]) -> None:
    bnn = bayesify(copy.deepcopy(model), members=2, init_scale=0.5, task="classification").eval()
    x = torch.randn(5, 7, 4) if isinstance(model, FirstToken) else torch.randn(5, 4)
    outputs = bnn.predict(x, **options).outputs
    assert outputs.untyped_storage().nbytes() == 4 * outputs.numel()
    if "samples" not in options:
        for k in range(2):
            torch.testing.assert_close(outputs[k, 0], bnn.merge(k).eval()(x))
