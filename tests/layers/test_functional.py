"""Parameters that a module's own code multiplies with: every kind of product, views of weights, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import BayesianModel, BayesifyError, ConversionError, bayesify

B, T, D = 3, 5, 6


class Product(nn.Module):
    """One parameter, multiplied as told; its outputs pass through a layer."""

    def __init__(self, shape: tuple[int, ...], multiply: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / 2)
        self.bias = nn.Parameter(torch.randn(4))
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, self.bias).flatten(1)


# name: (shape, roles, product of x [B, T, D], the weight and a bias [4])
PRODUCTS: dict[str, tuple[tuple[int, ...], str, Callable[..., Tensor]]] = {
    "linear": ((4, D), "fc", lambda x, w, b: F.linear(x, w, b)),
    "linear-keywords": ((4, D), "fc", lambda x, w, b: F.linear(input=x, bias=b, weight=w)),
    "matmul": ((D, 4), "cf", lambda x, w, b: torch.matmul(x, w) + b),
    "operator": ((D, 4), "cf", lambda x, w, b: x @ w),
    "transposed": ((4, D), "fc", lambda x, w, b: x @ w.T),
    "from-the-left": ((4, T), "fc", lambda x, w, b: w @ x),
    "of-the-transposed": ((4, D), "fc", lambda x, w, b: (w @ x.mT).mT),
    "each-head": ((2, D // 2, 4), "gcf", lambda x, w, b: x.unflatten(-1, (2, -1)).transpose(1, 2) @ w),
    "bmm": ((2, D, 4), "gcf", lambda x, w, b: torch.bmm(x[:, 0].expand(2, -1, -1), w).transpose(0, 1)),
    "addmm": ((D, 4), "cf", lambda x, w, b: torch.addmm(b, x[:, 0], w)),
    "baddbmm": ((2, D, 4), "gcf", lambda x, w, b: torch.baddbmm(b, x[:, :2].transpose(0, 1), w).transpose(0, 1)),
    "chunks": ((8, D), "fc", lambda x, w, b: F.linear(x, w.chunk(2)[0], b) * F.linear(x, w.chunk(2)[1]).tanh()),
    "slices": ((7, D), "fc", lambda x, w, b: F.linear(x, w[:4], b) + F.linear(x, w[3:])),
    "selected": ((3, 4, D), "gfc", lambda x, w, b: F.linear(x, w[0], b) * F.linear(x, w[2])),
    "unbound": ((2, 4, D), "gfc", lambda x, w, b: F.linear(x, w.unbind(0)[1], b)),
    "reshaped": ((2, 2, D), "ffc", lambda x, w, b: F.linear(x, w.reshape(4, D), b)),
    "wide-input": ((4, 2, D // 2), "fcc", lambda x, w, b: F.linear(x, w.flatten(1), b)),
    "in-another-type": ((4, D), "fc", lambda x, w, b: F.linear(x, w.to(x.dtype).contiguous(), b)),
    "einsum": ((D, 2, 4), "cff", lambda x, w, b: torch.einsum("btd,dhe->bhte", x, w)),
    "einsum-heads": ((2, D // 2, 4), "gcf", lambda x, w, b: torch.einsum("bthd,hde->bthe", x.unflatten(2, (2, -1)), w)),
    "einsum-any": ((4, D), "fc", lambda x, w, b: torch.einsum("fc, ...c -> ...f", w, x)),
    "einsum-time": ((T, 4), "cf", lambda x, w, b: torch.einsum("btd,tf->bdf", x, w)),
    "conv1d": ((4, D, 3), "fck", lambda x, w, b: F.conv1d(x.mT, w, b, padding=1)),
    "conv2d": ((4, 2, 2, 1), "fckk", lambda x, w, b: F.conv2d(x.unflatten(2, (2, 3)).transpose(1, 2), w, b)),
    "conv-transpose": ((D, 4, 2), "cfk", lambda x, w, b: F.conv_transpose1d(x.mT, w, b, 2)),
}  # fmt: skip


class UntracedProduct(Product):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1000:
            raise ValueError("too many examples")
        return super().forward(x)


def converted(model: nn.Module, **options: Any) -> BayesianModel:
    return bayesify(copy.deepcopy(model), members=3, **{"posterior": "deterministic", "init": "normal", **options})


def scaled(model: nn.Module, bnn: BayesianModel, member: int, roles: str) -> nn.Module:
    """The plain model with the weight times r and s of a member, written out by einsum."""
    reference = copy.deepcopy(model)
    factors = {side: factor.loc[member].detach() for _, side, factor in bnn.factors()}
    weight = next(p for n, p in reference.named_parameters() if n.endswith("weight"))
    letters = "abcd"[: weight.dim()]
    with torch.no_grad():
        for side, kept in (("s", "gc"), ("r", "gf")):
            own = "".join(letter for letter, role in zip(letters, roles, strict=True) if role in kept)
            sizes = [n for n, role in zip(weight.shape, roles, strict=True) if role in kept]
            assert factors[side].shape == (math.prod(sizes),)
            weight.copy_(torch.einsum(f"{letters},{own}->{letters}", weight, factors[side].view(sizes)))
    return reference


@pytest.mark.parametrize("route", ["fx", "export"])
@pytest.mark.parametrize("name", PRODUCTS)
@torch.no_grad()
def test_members_equal_products_with_scaled_weights(name: str, route: str) -> None:
    torch.manual_seed(0)
    shape, roles, multiply = PRODUCTS[name]
    model = nn.Sequential((Product if route == "fx" else UntracedProduct)(shape, multiply))
    x = torch.randn(B, T, D)
    bnn = converted(model, **({} if route == "fx" else {"example_inputs": x}))
    assert bnn.report.routes["0"] == route
    assert not bnn.report.skipped
    assert {n for n, _, _ in bnn.factors()} == set(bnn.report.converted) == {"0"}
    base, found = model(x), bnn.predict(x).outputs[:, 0]
    for k in range(3):
        expected = scaled(model, bnn, k, roles)(x)
        torch.testing.assert_close(found[k], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bnn.merge(k)(x), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, base, atol=1e-3)
    assert [type(module) for module in bnn.unload().modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(bnn.model(x), base, rtol=0, atol=0)


@pytest.mark.parametrize("name", PRODUCTS)
def test_draws_of_each_example_stay_with_it(name: str) -> None:
    torch.manual_seed(0)
    shape, _, multiply = PRODUCTS[name]
    bnn = converted(Product(shape, multiply), posterior="normal", posterior_scale=0.5).double()
    x = torch.randn(B, T, D, dtype=torch.float64)
    outputs = bnn.predict(x, samples=4, seed=0).outputs
    assert torch.equal(outputs, bnn.predict(x, samples=4, seed=0).outputs)
    other = x.clone()
    other[1] = torch.randn(T, D)
    moved = bnn.predict(other, samples=4, seed=0).outputs != outputs
    assert moved[:, :, 1].any()
    assert not moved[:, :, [0, 2]].any()
    same = bnn.predict(x[:1].expand(B, -1, -1), samples=1, seed=0).outputs[:, 0]
    assert (same[:, 0] - same[:, 1]).abs().max() > 1e-3, "examples have draws of their own"


@pytest.mark.parametrize("name", ["linear", "each-head", "einsum", "conv1d"])
@torch.no_grad()
def test_added_factors(name: str) -> None:
    torch.manual_seed(0)
    shape, _, multiply = PRODUCTS[name]
    model = Product(shape, multiply)
    x = torch.randn(B, T, D)
    neutral = converted(model, perturbation="additive", init="ones")
    torch.testing.assert_close(neutral.predict(x).outputs[0, 0], model(x))
    bnn = converted(model, perturbation="additive", factors="outputs")
    difference = bnn.predict(x).outputs[:, 0] - model(x)
    r = next(factor for _, _, factor in bnn.factors()).loc
    assert set(difference[0, 0].round(decimals=4).unique().tolist()) == set(r[0].round(decimals=4).unique().tolist())
    with pytest.raises(ConversionError, match="no bias"):
        bnn.merge()


REFUSED: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], str]] = {
    "changed": ((D, 4), lambda x, w, b: x @ w.softmax(0), "changed by softmax"),
    "looked-up": ((D, 4), lambda x, w, b: x @ w[torch.arange(D).flip(0), :], "changed by getitem"),
    "two-ways": ((D, D), lambda x, w, b: F.linear(x, w) + x @ w, "in several ways"),
    "constant": ((D, 4), lambda x, w, b: x[..., :4] + torch.ones(D) @ w, "the same for every example"),
    "grouped": ((4, 3, 1), lambda x, w, b: F.conv1d(x.mT, w, groups=2), "no rank-1 equivalent"),
    "vector": ((D,), lambda x, w, b: torch.matmul(x, w), "no rank-1 equivalent"),
    "mixed-channels": ((2, 3, 4), lambda x, w, b: x @ w.transpose(0, 1).reshape(6, 4), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_products_without_an_equivalent_are_listed(name: str) -> None:
    shape, multiply, reason = REFUSED[name]
    model = nn.Sequential(nn.Linear(D, D), Product(shape, multiply))
    bnn = bayesify(model, members=2)
    if not reason:
        assert set(bnn.report.converted) == {"0", "1"}
        return
    assert set(bnn.report.converted) == {"0"}
    assert reason in bnn.report.skipped["1.weight"]


class Heads(nn.Module):
    """A child's weight used without calling the child, a matrix of its own, and a child that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.matrix = nn.Parameter(torch.randn(D, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.qkv.weight).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1) @ self.matrix)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"0.qkv", "0.matrix", "0.head"}),
        ({"exclude": "0.qkv"}, {"0.matrix", "0.head"}),
        ({"include": "0.matrix"}, {"0.matrix"}),
        ({"exclude": ("0.matrix", "0.qkv")}, {"0.head"}),
        ({"include": "0"}, {"0.qkv", "0.matrix", "0.head"}),
    ],
)
@torch.no_grad()
def test_sites_of_one_module_are_chosen_by_name(options: dict[str, Any], expected: set[str]) -> None:
    bnn = bayesify(nn.Sequential(Heads()), members=2, init="normal", posterior="deterministic", **options)
    assert set(bnn.report.converted) == {name for name, _, _ in bnn.factors()} == expected
    assert set(bnn.report.skipped) == {"0.qkv", "0.matrix", "0.head"} - expected
    x = torch.randn(B, T, D)
    found = bnn.predict(x).outputs[:, 0]
    for member in range(2):
        torch.testing.assert_close(bnn.merge(member)(x), found[member])


def test_such_modules_are_copied_saved_and_trained() -> None:
    torch.manual_seed(0)
    bnn = bayesify(nn.Sequential(Heads()), members=2, init="normal")
    x = torch.randn(B, T, D)
    twin = copy.deepcopy(bnn)
    assert torch.equal(twin.predict(x, samples=2, seed=1).outputs, bnn.predict(x, samples=2, seed=1).outputs)
    other = bayesify(nn.Sequential(Heads()), members=2)
    other.load_state_dict(bnn.state_dict())
    assert torch.equal(other.predict(x).outputs, bnn.predict(x).outputs)
    bnn.train()(x).square().mean().backward()
    for name, side, factor in bnn.factors():
        for parameter in factor.parameters():
            assert parameter.grad is not None, (name, side)
            assert bool(parameter.grad.abs().max() > 0), (name, side)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_module_predicts_the_same() -> None:
    torch.manual_seed(0)
    bnn = bayesify(nn.Sequential(Heads()), members=2, init="normal", posterior="deterministic").eval()
    x = torch.randn(B, T, D)
    expected = bnn(x)
    compiled = torch.compile(bnn, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


def test_a_layer_called_inside_keeps_its_factors_to_itself() -> None:
    """A weight that is read directly and by its layer belongs to neither."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(D, D), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.linear(self.encoder(x).relu(), self.encoder.weight))

    report = bayesify(Both(), members=2).report
    assert set(report.converted) == {"head"}
    assert "by the layer encoder" in report.skipped["encoder"]


def test_rows_that_are_no_multiple_of_the_draws() -> None:
    bnn = bayesify(Product((D, 4), lambda x, w, b: x.flatten(0, 1)[:7] @ w), members=2)
    with pytest.raises(BayesifyError, match="no multiple"):
        bnn.predict(torch.randn(2, T, D), samples=1)
