"""The product of a site in one piece: the same values and gradients as operation by operation, and no more memory."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bayesify import bayesify
from bayesify.layers import matmul, pointwise
from bayesify.layers import product as module
from bayesify.layers.maps import DENSE, Convolution
from bayesify.layers.pointwise import is_pointwise
from bayesify.layers.product import product

N = 12


def convolution(stride: int = 1, padding: int = 1, groups: int = 1, transposed: bool = False) -> Convolution:
    return Convolution([stride] * 2, [padding] * 2, [1] * 2, transposed, [0] * 2, groups)


MAPS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], int, int]] = {
    # map, shape of x, shape of W, channels out, channel dimension
    "dense": (DENSE, (N, 6), (5, 6), 5, -1),
    "tokens": (DENSE, (N, 7, 6), (5, 6), 5, -1),
    "positions": (DENSE, (N, 4, 4, 6), (5, 6), 5, -1),
    "images": (convolution(), (N, 6, 5, 5), (4, 6, 3, 3), 4, 1),
    "pointwise": (convolution(padding=0), (N, 6, 5, 5), (4, 6, 1, 1), 4, 1),
    "strided": (convolution(stride=2), (N, 6, 5, 5), (4, 6, 3, 3), 4, 1),
    "depthwise": (convolution(groups=6), (N, 6, 5, 5), (6, 1, 3, 3), 6, 1),
    "grouped": (convolution(groups=2), (N, 6, 5, 5), (4, 3, 3, 3), 4, 1),
    "transposed, depthwise": (convolution(groups=6, transposed=True), (N, 6, 5, 5), (6, 1, 3, 3), 6, 1),
    "transposed": (convolution(stride=2, transposed=True), (N, 6, 5, 5), (6, 4, 3, 3), 4, 1),
    "transposed, grouped": (convolution(groups=2, transposed=True), (N, 6, 5, 5), (6, 2, 3, 3), 4, 1),
}  # fmt: skip


POINTWISE = ("positions", "pointwise")


@pytest.fixture(autouse=True)
def blas_is_as_wide_as_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tests take the same ways on all processors."""
    monkeypatch.setattr(pointwise, "has_wider_onednn", lambda: False)


@pytest.fixture(params=[False, True], ids=["whole", "chunks"])
def chunks(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Chunks of a few rows, as large inputs have."""
    if request.param:
        monkeypatch.setattr(module, "CHUNK_BYTES", 1)
        monkeypatch.setattr(module, "_weight_bytes", lambda weight: 0)
    return request.param


def operands(name: str, rows: int, bias_rows: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W, b, s, r that broadcast, with gradients."""
    _, x, weight, out, dim = MAPS[name]
    torch.manual_seed(0)

    def along(count: int, channels: int) -> Tensor:
        shape = [1] * len(x)
        shape[0], shape[dim] = count, channels
        return torch.randn(shape, dtype=dtype) + 1

    values = [torch.randn(x, dtype=dtype), torch.randn(weight, dtype=dtype), along(bias_rows, out), along(rows, x[dim]),
              along(rows, out)]  # fmt: skip
    return [value.requires_grad_() for value in values]


def plain(x: Tensor, weight: Tensor, bias: Tensor, s: Tensor, r: Tensor, linear: Any) -> Tensor:
    return linear(x * s, weight) * r + bias


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), inputs))


@pytest.mark.parametrize(("rows", "bias_rows"), [(N, 1), (1, 1), (N, N)])
@pytest.mark.parametrize("name", MAPS)
def test_values_and_gradients(name: str, rows: int, bias_rows: int, chunks: bool) -> None:
    linear = MAPS[name][0]
    inputs = operands(name, rows, bias_rows)
    y = product(*inputs, linear, single=rows == 1)
    assert y is not None
    assert is_pointwise(*inputs[:2], linear, False, *inputs[3:]) == (name in POINTWISE)
    expected = plain(*inputs, linear)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, inputs), gradients(expected, inputs))
    with torch.no_grad():
        torch.testing.assert_close(product(*inputs, linear, single=rows == 1), expected.detach())


@pytest.mark.parametrize(("rows", "bias_rows"), [(N, 1), (1, 1), (N, N)])
@pytest.mark.parametrize("given", ["xWbsr", "Wbsr", "sr", "Wbs", "s"], ids=lambda names: f"of {names}")
@pytest.mark.parametrize("name", ["images", "strided"])
def test_gradients_of_a_first_convolution(
    name: str, given: str, rows: int, bias_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose input wants none: they come from those of the weights of rows."""
    calls: list[int] = []
    of_first = module._of_first
    monkeypatch.setattr(module, "LARGE_ROW_BYTES", 1)
    monkeypatch.setattr(module, "_of_first", lambda *args: calls.append(1) or of_first(*args))
    linear = MAPS[name][0]
    inputs = [
        value.requires_grad_(letter in given)
        for letter, value in zip("xWbsr", operands(name, rows, bias_rows), strict=True)
    ]
    wanted = [value for value in inputs if value.requires_grad]
    found = gradients(cast(Tensor, product(*inputs, linear, single=False)), wanted)
    torch.testing.assert_close(found, gradients(plain(*inputs, linear), wanted))
    assert len(calls) == ("x" not in given)
    half = [value.detach().bfloat16() for value in inputs[:2]]
    assert not module._is_first(*half, half[0], linear), "sums over rows would round"


@pytest.mark.parametrize("missing", [(), (3, 4)], ids=["both factors", "no factors"])
@pytest.mark.parametrize("name", ["dense", "tokens"])
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_a_weight_is_packed_once_for_all_chunks(
    name: str, missing: tuple[int, ...], chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[bool] = []
    pack = matmul.packed

    def noted(weight: Tensor, like: Tensor) -> Tensor:
        found = pack(weight, like)
        packed.append(found.is_mkldnn)
        return found

    monkeypatch.setattr(matmul, "has_wider_onednn", lambda: True)
    monkeypatch.setattr(matmul, "SMALLEST", 0)
    monkeypatch.setattr(matmul, "packed", noted)
    inputs = operands(name, N, dtype=torch.float32)
    given: list[Any] = [None if i in missing else value for i, value in enumerate(inputs)]
    present = [value for i, value in enumerate(inputs) if i not in missing]
    found = product(*given, DENSE, single=False)
    assert found is not None
    precise = [value.detach().double() for value in inputs]
    neutral = [1.0 if i in missing else value.requires_grad_() for i, value in enumerate(precise)]
    expected = plain(*neutral, DENSE)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected.float())
    wanted = [value for i, value in enumerate(precise) if i not in missing]
    of_expected = [gradient.float() for gradient in torch.autograd.grad(expected.sum(), wanted)]
    torch.testing.assert_close(list(torch.autograd.grad(found.sum(), present)), of_expected, rtol=1e-4, atol=1e-4)
    assert packed == ([True, True] if chunks else [])


@pytest.mark.parametrize("name", ["images", "pointwise", "positions", "depthwise"])
@pytest.mark.parametrize("missing", [(2,), (3,), (4,), (2, 4), (3, 4)], ids=str)
def test_what_is_missing_changes_nothing(missing: tuple[int, ...], name: str, chunks: bool) -> None:
    inputs: list[Any] = operands(name, N)
    linear = MAPS[name][0]
    neutral = [value if i not in missing else (0.0 if i == 2 else 1.0) for i, value in enumerate(inputs)]
    given = [None if i in missing else value for i, value in enumerate(inputs)]
    present = [value for i, value in enumerate(inputs) if i not in missing]
    y = product(*given, linear, single=False)
    assert y is not None
    expected = plain(*neutral, linear)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, present), gradients(expected, present))


@pytest.mark.parametrize("name", ["images", "pointwise", "positions", "depthwise"])
@pytest.mark.parametrize("change", ["relu", "add", "none, r = 0"])
def test_outputs_changed_in_place_and_factors_at_zero(change: str, name: str, chunks: bool) -> None:
    inputs = operands(name, N)
    linear = MAPS[name][0]
    if change.endswith("r = 0"):
        with torch.no_grad():
            inputs[4].flatten(1)[1, 2] = 0.0

    def after(y: Tensor | None) -> Tensor:
        assert y is not None
        y = y * 1 if not y.requires_grad else y
        return F.relu_(y) if change == "relu" else y.add_(3.0).square() if change == "add" else y

    y, expected = after(product(*inputs, linear, single=False)), after(plain(*inputs, linear))
    torch.testing.assert_close(y, expected)
    found = gradients(y, inputs)
    torch.testing.assert_close(found, gradients(expected, inputs))
    assert change == "relu" or found[4].abs().min() > 0


@pytest.mark.parametrize(("least", "looked"), [(1e-9, True), (0.5, False), (math.nan, True), (None, True)])
def test_factors_are_looked_at_where_they_may_be_small(
    least: float | None, looked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = operands("images", N)
    with torch.no_grad():
        inputs[4].abs_().add_(1.0)
    looks: list[float] = []
    own = module._looked_at
    monkeypatch.setattr(module, "_looked_at", lambda r, limit: looks.append(limit) or own(r, limit))
    y = product(*inputs, MAPS["images"][0], single=False, least=None if least is None else lambda: least)
    assert y is not None
    torch.testing.assert_close(gradients(y, inputs), gradients(plain(*inputs, MAPS["images"][0]), inputs))
    assert bool(looks) == looked


def test_channels_apart_have_the_product_of_both_factors_which_may_be_smaller_than_either() -> None:
    inputs = operands("depthwise", N)
    with torch.no_grad():
        inputs[3].fill_(1e-4)
        inputs[4].fill_(1e-4)
    y = product(*inputs, MAPS["depthwise"][0], single=False, least=lambda: 1e-4)
    assert y is not None
    expected = gradients(plain(*inputs, MAPS["depthwise"][0]), inputs)
    torch.testing.assert_close(gradients(y, inputs), expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", ["tokens", "grouped", "pointwise", "positions"])
def test_gradients_of_gradients(name: str) -> None:
    inputs = operands(name, N)
    mapped = partial(product, linear=MAPS[name][0], single=False)
    assert torch.autograd.gradgradcheck(mapped, inputs, fast_mode=True)  # along random directions


@pytest.mark.parametrize(
    "change",
    [{"stride": [2, 2]}, {"padding": [1, 1]}, {"groups": 2}, {"transposed": True}],
    ids=lambda change: next(iter(change)),
)
def test_only_plain_convolutions_of_one_by_one_are_pointwise(change: dict[str, Any]) -> None:
    linear, x, weight = convolution(padding=0), torch.ones(2, 4, 16, 16), torch.ones(4, 4, 1, 1)
    assert is_pointwise(x, weight, linear, single=False)
    assert not is_pointwise(x, weight, dataclasses.replace(linear, **change), single=False)
    assert not is_pointwise(x.to(memory_format=torch.channels_last), weight, linear, single=False)
    assert not is_pointwise(x[..., :1, :1].contiguous(), weight, linear, single=False), "folding would cost more"
    assert not is_pointwise(x, torch.ones(4, 4, 3, 3), linear, single=False)


def test_dense_maps_of_many_positions_are_pointwise(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _, s, r = (value.detach() for value in operands("positions", N))
    assert is_pointwise(x, weight, DENSE, False, s, r)
    assert is_pointwise(x, weight, DENSE, False, None, r)
    assert not is_pointwise(x, weight, DENSE, False), "there are no passes to be saved"
    assert not is_pointwise(x, weight, DENSE, True, s, r)
    assert not is_pointwise(x[:, 0, 0].contiguous(), weight, DENSE, False, s[:, 0, 0], r[:, 0, 0])
    assert not is_pointwise(x[:, :, :2].contiguous(), weight, DENSE, False, s, r), "folding would cost more"
    assert not is_pointwise(x, weight, DENSE, False, s.expand(-1, 4, -1, -1), r), "positions differ in their factors"
    assert not is_pointwise(x.half(), weight.half(), DENSE, False, s.half(), r.half())
    monkeypatch.setattr(pointwise, "CHANNELS_OF_FACTORS", 1)
    assert not is_pointwise(x, weight, DENSE, False, s, r), "gradients of factors alone would cost more"
    assert is_pointwise(x, weight.requires_grad_(), DENSE, False, s, r)
    monkeypatch.setattr(pointwise, "has_wider_onednn", lambda: True)
    assert not is_pointwise(x, weight, DENSE, False, s, r)


def test_one_weight_for_all_images_is_pointwise_where_images_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = operands("pointwise", 1)
    linear = MAPS["pointwise"][0]
    expected = plain(*inputs, linear)
    expected_gradients = gradients(expected, inputs)
    for limit in (1, 1 << 30):
        monkeypatch.setattr(pointwise, "LARGE_BYTES", limit)
        assert is_pointwise(inputs[0], inputs[1], linear, single=True) == (limit == 1)
        y = product(*inputs, linear, single=True)
        assert y is not None
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(gradients(y, inputs), expected_gradients)


def test_backward_twice() -> None:
    inputs = operands("tokens", N)
    y = product(*inputs, DENSE, single=False)
    assert y is not None
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs), first)


@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Conv2d(6, 4, 3)], ids=["linear", "conv"])
def test_autocast_casts_as_the_plain_layer_does(layer: nn.Module) -> None:
    x = torch.randn(N, 6) if isinstance(layer, nn.Linear) else torch.randn(N, 6, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        y = bayesify(layer, members=1, init="ones", posterior="deterministic", task="regression").train()(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_memory_layout_of_images_is_kept(chunks: bool) -> None:
    inputs = operands("images", N, dtype=torch.float32)
    x = inputs[0].detach().to(memory_format=torch.channels_last)
    y = product(x, *inputs[1:], convolution(), single=False)
    assert y is not None
    assert y.is_contiguous(memory_format=torch.channels_last)


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes of different storages that a forward pass keeps for its backward pass."""
    output = model(x)
    nodes, seen, sizes = [output.grad_fn], set(), {}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += [*getattr(node, "saved_tensors", ()), getattr(node, "out", None)]
        for tensor in saved:
            if isinstance(tensor, Tensor):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(sizes.values())


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-2, 1e-4])
def test_small_factors_have_gradients_in_half_precision(size: float) -> None:
    """The output, r ∘ y + b, is rounded: what is left of y in it is not enough to have the gradient of r from it."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(64, 32), torch.randn(16, 32) / 32**0.5, torch.ones(1, 16)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        r = torch.full((1, 16), size, dtype=dtype, requires_grad=True)
        y = product(*(t.to(torch.bfloat16).to(dtype) for t in (x, weight, bias)), None, r, DENSE, False)
        assert y is not None
        found += torch.autograd.grad((y - 1).sum(), r)
    exact, half = found[0], found[1].double()
    assert float((half - exact).norm() / exact.norm()) < 0.06


def test_gradient_checkpointing_keeps_nothing() -> None:
    inputs = operands("images", N)
    expected = gradients(plain(*inputs, convolution()), inputs)
    nodes: list[Any] = []

    def block(*values: Tensor) -> Tensor:
        y = product(*values, convolution(), single=False)
        assert y is not None
        nodes.append(y.grad_fn)
        return y * 1

    y = checkpoint(block, *inputs, use_reentrant=False)
    assert nodes[0].out is None
    block(*inputs)
    assert nodes[1].out is not None
    torch.testing.assert_close(gradients(y, inputs), expected)


def test_training_keeps_no_more_activations_than_the_plain_network() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(4)]
        return nn.Sequential(*blocks)

    x = torch.randn(8, 16, 16, 16)
    bnn = bayesify(network(), members=2).train()
    assert kept(bnn, x) < 1.1 * kept(network(), x.repeat(2, 1, 1, 1))
