"""Random search over small networks that mix kinds of layers, reuse, branches, groups, layouts and types.

    BAYESIFY_RANDOM_NETWORKS=1000 python -m pytest tests/graph/test_random_networks.py

Every block maps [B, T, D] to [B, T, D], so that any tree of blocks is a network.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import bayesify

B, T, D = 2, 6, 8
CASES = int(os.environ.get("BAYESIFY_RANDOM_NETWORKS", "60"))
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.08}


class Apply(nn.Module):
    """A module between two rearrangements of its input."""

    def __init__(
        self, module: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.module, self.before, self.after = module, before, after

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(self.before(x))
        return self.after(y[0] if isinstance(y, tuple) else y)


class Product(nn.Module):
    """A parameter that the module's own code multiplies."""

    def __init__(self, shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / 3)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight)


class Attention(nn.Module):
    def __init__(self, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=batch_first)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        q = x if self.attention.batch_first else x.transpose(0, 1)
        y = self.attention(q, q, q, need_weights=self.need_weights)[0]
        return y if self.attention.batch_first else y.transpose(0, 1)


class Borrowed(nn.Module):
    """Uses the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 2 * D)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = F.linear(x, self.layer.weight, self.layer.bias).chunk(2, -1)
        return value * gate.sigmoid()


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    """One module, called again on what it gave."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x).tanh())


class Branches(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.join = nn.Linear(2 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([self.left(x), self.right(x)], -1))


class Untraceable(nn.Module):
    """Python that tracing does not get through."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        if x.shape[0] > 10_000 or options:
            raise ValueError("too many examples")
        return self.inner(x)


def _image(module: nn.Module) -> nn.Module:
    """On [B, D, 2, 3]."""
    return Apply(module, lambda x: x.mT.unflatten(2, (2, 3)), lambda y: y.flatten(2).mT)


def _time(module: nn.Module) -> nn.Module:
    """On [B, D, T]."""
    return Apply(module, lambda x: x.mT, lambda y: y.mT)


def _by_heads(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bthd,hde->bthe", x.unflatten(2, (2, -1)), weight).flatten(2)


def _same(x: Tensor) -> Tensor:
    return x


LEAVES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "linear-no-bias": lambda: nn.Linear(D, D, bias=False),
    "norm": lambda: nn.LayerNorm(D),
    "conv2d": lambda: _image(nn.Conv2d(D, D, 3, padding=1)),
    "grouped": lambda: _image(nn.Conv2d(D, D, 3, padding=1, groups=4, bias=False)),
    "depthwise": lambda: _image(nn.Conv2d(D, D, 3, padding="same", groups=D, padding_mode="circular")),
    "batch-norm": lambda: _image(nn.Sequential(nn.Conv2d(D, D, 1), nn.BatchNorm2d(D), nn.ReLU())),
    "transposed": lambda: _image(nn.ConvTranspose2d(D, D, 3, padding=1, groups=2)),
    "conv1d": lambda: _time(nn.Conv1d(D, D, 3, padding=2, dilation=2)),
    "over-time": lambda: _time(nn.Linear(T, T)),
    "lstm": lambda: Apply(nn.LSTM(D, D // 2, bidirectional=True, batch_first=True), _same, _same),
    "gru": lambda: Apply(nn.GRU(D, D, 2), lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "attention": lambda: Attention(batch_first=True, need_weights=False),
    "attention-time-first": lambda: Attention(batch_first=False, need_weights=True),
    "encoder": lambda: nn.TransformerEncoderLayer(D, 2, 12, dropout=0.0, batch_first=True),
    "matmul": lambda: Product((D, D), lambda x, w: x @ w),
    "transposed-matmul": lambda: Product((D, D), lambda x, w: F.linear(x, w).tanh()),
    "heads": lambda: Product((2, D // 2, D // 2), _by_heads),
    "mix-time": lambda: Product((T, T), lambda x, w: w @ x),
    "borrowed": Borrowed,
    "time-first": lambda: Apply(nn.Linear(D, D), lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "windows": lambda: Apply(nn.Linear(D, D), lambda x: x.reshape(-1, 3, D), lambda y: y.reshape(-1, T, D)),
    "rows": lambda: Apply(nn.Linear(D, D), lambda x: x.flatten(0, 1), lambda y: y.unflatten(0, (-1, T))),
    "weight-norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
}  # fmt: skip

TREES = st.recursive(
    st.sampled_from(sorted(LEAVES)),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from(["residual", "twice", "untraceable"]), inner),
        st.tuples(st.sampled_from(["branches", "then"]), inner, inner),
    ),
    max_leaves=5,
)


def build(tree: Any) -> nn.Module:
    if isinstance(tree, str):
        return LEAVES[tree]()
    kind, *parts = tree
    made = [build(part) for part in parts]
    if kind == "then":
        return nn.Sequential(made[0], nn.GELU(), made[1])
    return {"residual": Residual, "twice": Twice, "untraceable": Untraceable, "branches": Branches}[kind](*made)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


@settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(tree=TREES, seed=st.integers(0, 999), dtype=st.sampled_from(list(TOLERANCES)), given_inputs=st.booleans())
def test_random_networks_keep_the_promises(tree: Any, seed: int, dtype: torch.dtype, given_inputs: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(build(tree), nn.Linear(D, 3)).to(dtype).eval()
    x = torch.randn(B, T, D, dtype=dtype)
    options: dict[str, Any] = {"members": 2, "posterior": "deterministic"}
    if given_inputs:
        options["example_inputs"] = x
    with torch.no_grad():
        expected = model(x)
        neutral = bayesify(copy.deepcopy(model), init="ones", **options)
        for member in neutral.predict(x).outputs[:, 0]:
            assert relative_error(member.to(dtype), expected) <= TOLERANCES[dtype]
    bnn = bayesify(model.double(), init="normal", init_scale=0.3, **{**options, "example_inputs": None}).eval()
    assert all("norm" in name or "bias" in name for name in bnn.report.skipped), bnn.report.skipped
    x = x.double()
    with torch.no_grad():
        found = bnn.predict(x).outputs[:, 0]
        for k in range(2):
            torch.testing.assert_close(bnn.merge(k)(x), found[k], rtol=1e-9, atol=1e-9)
    bnn.training = True
    rows = bnn(x).unflatten(0, (2, B))
    (rows[1] * torch.randn_like(rows[1])).sum().backward()
    for name, side, factor in bnn.factors():
        gradient = factor.loc.grad
        assert gradient is not None, f"{side} of {name} is not used"
        assert bool((gradient[0] == 0).all()), f"{side} of {name} reaches another member"
        assert bool((gradient[1] != 0).any()), f"{side} of {name} does not move its member"
