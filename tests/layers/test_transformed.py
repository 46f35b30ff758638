"""Weights that are computed from others, or stored in few bits: the layer's own code runs between the factors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from bayesify import ConversionError, bayesify, from_pretrained

PLAIN: dict[str, Any] = {"members": 2, "init": "normal", "init_scale": 0.5, "posterior": "deterministic"}

# name: (what is done to a layer, whether factors can be folded into it)
TRANSFORMS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "weight-norm": (parametrizations.weight_norm, True),
    "spectral-norm": (parametrizations.spectral_norm, False),
    "orthogonal": (parametrizations.orthogonal, False),
    "weight-norm-by-hooks": (nn.utils.weight_norm, False),
    "spectral-norm-by-hooks": (nn.utils.spectral_norm, False),
}


def transformed(name: str, kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(6, 8) if kind == "linear" else nn.Conv1d(6, 8, 3, padding=1)
    return nn.Sequential(TRANSFORMS[name][0](layer)).eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", TRANSFORMS)
@torch.no_grad()
def test_factors_go_around_what_the_layer_computes(name: str, kind: str) -> None:
    model: Any = transformed(name, kind)  # built anew: tensors that hooks make cannot be copied
    bnn = bayesify(transformed(name, kind), **PLAIN)
    x = torch.randn(4, 6) if kind == "linear" else torch.randn(4, 6, 5)
    column = (-1,) if kind == "linear" else (-1, 1)
    factors = {side: factor.loc for _, side, factor in bnn.factors()}
    found = bnn.predict(x).outputs[:, 0]
    bias = model[0].bias.view(column)
    for member in range(2):
        s, r = factors["s"][member].view(column), factors["r"][member].view(column)
        expected = r * (model(x * s) - bias) + bias
        torch.testing.assert_close(found[member], expected, rtol=1e-4, atol=1e-5)
    if TRANSFORMS[name][1]:
        torch.testing.assert_close(bnn.merge(1)(x), found[1], rtol=1e-4, atol=1e-5)
    elif "hooks" not in name:
        with pytest.raises(ConversionError, match="transforms its weight"):
            bnn.merge(1)
    torch.testing.assert_close(bnn.unload()(x), model(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("name", ["weight-norm-by-hooks", "spectral-norm-by-hooks"])
def test_weights_made_by_hooks_cannot_be_merged(name: str) -> None:
    model = transformed(name, "linear")
    model(torch.randn(2, 6))
    bnn = bayesify(model, **PLAIN)
    bnn.predict(torch.randn(2, 6))  # from here on the weight is no result of a graph, and can be copied
    with pytest.raises(ConversionError, match="transforms its weight"):
        bnn.merge(0)


@pytest.fixture
def quantized() -> Callable[[], nn.Module]:
    """A network with int8 weights, made anew at every call."""
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def make() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        ao.quantize_(model, ao.Int8WeightOnlyConfig())
        return model

    return make


@pytest.mark.filterwarnings("ignore")
def test_weights_in_int8(quantized: Callable[[], nn.Module], tmp_path: Path) -> None:
    x = torch.randn(5, 32)
    expected = quantized()(x)
    neutral = bayesify(quantized(), example_inputs=x, **{**PLAIN, "init": "ones"})
    torch.testing.assert_close(neutral.predict(x).outputs[0, 0], expected, rtol=1e-5, atol=1e-6)
    bnn = bayesify(quantized(), **{**PLAIN, "posterior": "normal"})
    assert set(bnn.report.converted) == {"0", "2"}
    bnn.train()(x).square().mean().backward()
    for _, _, factor in bnn.factors():
        assert factor.loc.grad is not None
        assert bool(factor.loc.grad.abs().max() > 0)
    predicted = bnn.predict(x, samples=2, seed=0).outputs
    assert torch.equal(copy.deepcopy(bnn).predict(x, samples=2, seed=0).outputs, predicted)
    with pytest.raises(ConversionError, match="low-bit"):
        bnn.merge()
    bnn.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, base_model=quantized())
    assert torch.equal(again.predict(x, samples=2, seed=0).outputs, predicted)
    assert not torch.allclose(predicted.mean((0, 1)), expected, atol=1e-2)
