"""Parameters at the borders of graphs: in regions of an exported one, given to children or to functions that are not
traced, returned to callers."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer

from bayesify import BayesifyError, bayesify


class Regions(nn.Module):
    """Multiplies with parameters where gradients are off, where the precision is fixed, and where both are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.off, self.fixed, self.both, self.changed = (nn.Parameter(torch.randn(4, 4)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1000:
            raise ValueError("too many examples")
        x = self.layer(x)
        with torch.no_grad():
            off = F.linear(x, self.off)
        with torch.autocast("cpu", enabled=False):
            fixed = x @ self.fixed.t()
            with torch.no_grad():
                both = F.linear(x, self.both) + F.linear(x, self.changed * 2)
        return x + off + fixed + both


def test_products_in_regions_of_an_exported_graph_are_sites() -> None:
    x = torch.randn(3, 4)
    bnn = bayesify(Regions(), members=2, init="normal", example_inputs=x[:2])
    assert set(bnn.report.converted) == {"layer", "off", "fixed", "both"}
    assert "changed by mul" in bnn.report.skipped["changed"]
    outputs = bnn.predict(x).outputs
    for k in range(2):
        torch.testing.assert_close(outputs[k, 0], bnn.merge(k)(x))


class Pooling(nn.Module):
    """A learned query attends to the tokens of an example."""

    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)
        self.untraceable = untraceable

    def forward(self, x: Tensor) -> Tensor:
        if self.untraceable and x.shape[0] > 1000:
            raise ValueError("too many examples")
        return self.head(self.attention(self.query.repeat(x.shape[0], 1, 1), x, x)[0][:, 0])


@pytest.mark.parametrize("untraceable", [False, True], ids=["fx", "export"])
def test_attention_that_is_given_a_learned_query(untraceable: bool) -> None:
    x = torch.randn(3, 5, 8)
    bnn = bayesify(Pooling(untraceable), members=2, init="normal", example_inputs=x if untraceable else None)
    assert set(bnn.report.converted) == {"attention.in_proj_weight", "attention.out_proj", "head"}
    assert bnn.report.skipped["query"].startswith("raw parameter, ")
    outputs = bnn.predict(x).outputs
    for k in range(2):
        torch.testing.assert_close(outputs[k, 0], bnn.merge(k)(x))


def multiplied(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


torch.fx.wrap("multiplied")


class Wrapped(nn.Module):
    """Hands the weight of a layer to a function that torch.fx does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(multiplied(x, self.layer.weight).tanh())


def test_weights_in_functions_that_are_not_traced_are_found_in_an_exported_graph() -> None:
    x = torch.randn(2, 4)
    blind = bayesify(Wrapped(), members=2, init="normal")
    assert "neither traced nor exported" in blind.report.skipped["layer"]
    assert set(blind.report.converted) == {"head"}
    bnn = bayesify(Wrapped(), members=2, init="normal", example_inputs=x)
    assert set(bnn.report.converted) == {"layer", "head"}
    for model in (blind, bnn):
        outputs = model.predict(x).outputs
        for k in range(2):
            torch.testing.assert_close(outputs[k, 0], model.merge(k)(x))


def test_torchvisions_windowed_attention_keeps_all_its_layers() -> None:
    x = torch.randn(2, 3, 32, 32)
    network = SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=3).eval()
    bnn = bayesify(network, members=2, init="normal", example_inputs=x).eval()
    assert {f"features.1.{block}.attn.{layer}" for block in (0, 1) for layer in ("qkv", "proj")} <= set(
        bnn.report.converted
    )
    outputs = bnn.predict(x).outputs
    assert not torch.allclose(outputs[0], outputs[1])
    for k in range(2):
        torch.testing.assert_close(outputs[k, 0], bnn.merge(k)(x))


def test_a_layer_whose_forward_was_replaced_is_left_out() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    add_hook_to_module(network[2], ModelHook())
    bnn = bayesify(network, members=2, init="normal")
    assert set(bnn.report.converted) == {"0", "4"}
    assert "replaced on the object itself" in bnn.report.skipped["2"]
    x = torch.randn(3, 4)
    for k in range(2):
        torch.testing.assert_close(bnn.predict(x).outputs[k, 0], bnn.merge(k)(x))


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_have_exact_members(dora: bool) -> None:
    """DoRA takes the norm of a weight that another layer multiplies."""
    torch.manual_seed(0)
    network = nn.Sequential(OrderedDict(first=nn.Linear(4, 8), relu=nn.ReLU(), last=nn.Linear(8, 2)))
    options = LoraConfig(r=2, target_modules=["first"], use_dora=dora, init_lora_weights=False)
    x = torch.randn(3, 4)
    bnn = bayesify(get_peft_model(network, options), members=2, init="normal", example_inputs=x).eval()
    base = "base_model.model.first.base_layer"
    assert (base in bnn.report.converted) is not dora
    assert not dora or "DoRA" in bnn.report.skipped[base]
    for k in range(2):
        torch.testing.assert_close(bnn.predict(x).outputs[k, 0], bnn.merge(k)(x))
    torch.testing.assert_close(bnn.fuse(weights="copies", example_inputs=x)(x), bnn(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(BayesifyError, match="before the conversion"):
        bnn.merge_adapter()


class Latents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, 4))

    def forward(self, batch: int) -> Tensor:
        return self.latents.expand(batch, -1, -1)


class Reader(nn.Module):
    """Compares its tokens with what another module returns."""

    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.queries, self.keys, self.head = Latents(), nn.Linear(4, 4), nn.Linear(3, 2)
        self.untraceable = untraceable

    def forward(self, x: Tensor) -> Tensor:
        if self.untraceable and x.shape[0] > 1000:
            raise ValueError("too many examples")
        return self.head((self.keys(x) @ self.queries(x.shape[0]).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("untraceable", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_returned_parameter_is_listed(untraceable: bool, given: bool) -> None:
    report = bayesify(Reader(untraceable), members=2, example_inputs=torch.randn(3, 5, 4) if given else None).report
    assert set(report.converted) == {"keys", "head"}
    assert report.skipped["queries.latents"].startswith("raw parameter, ")


class Twice(nn.Module):
    """A layer that is called with a constant, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("table", torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1000:
            raise ValueError("too many examples")
        return self.head(self.layer(self.table).sum(0) + self.layer(x))


def test_layer_left_out_for_a_constant_is_no_site_in_its_own_code() -> None:
    bnn = bayesify(Twice(), members=2, example_inputs=torch.randn(3, 4))
    assert set(bnn.report.converted) == {"head"}
    assert "does not carry the batch" in bnn.report.skipped["layer"]
