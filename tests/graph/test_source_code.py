"""Weights that a forward reads behind its layer's back, where neither tracing nor export gets through it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import bayesify
from bayesify.graph.source import forward_names, layers_read


def far(x: Tensor) -> None:
    """What tracing does not get through."""
    if x.shape[0] > 1000:
        raise ValueError("too many examples")


class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())])
        self.inner = nn.ModuleDict({"deep": nn.Linear(4, 4)})
        self.wide = nn.Sequential(nn.Linear(4, 4))
        self.options = SimpleNamespace(weight=1.0)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Direct(Untraced):
    def forward(self, x: Tensor) -> Tensor:
        far(x)
        return self.second(F.linear(x, weight=self.first.weight.mul(2)))


class Described(Untraced):
    """What it reads of the weights are no values."""

    def forward(self, x: Tensor) -> Tensor:
        far(x)
        if isinstance(self.first.weight, nn.Parameter) and self.second.weight is not None:
            x = x.to(self.first.weight.dtype).to(self.second.weight)
        rows = self.first.weight.shape[0] + getattr(self.second, "weight").size(1)  # noqa: B009
        return self.second(self.first(x)) * rows * self.options.weight


class Alias(Untraced):
    def forward(self, x: Tensor) -> Tensor:
        far(x)
        layer = self.first if x.shape[1] else self.inner
        return self.second(x @ layer.weight)  # type: ignore[operator]


class ByString(Untraced):
    def forward(self, x: Tensor) -> Tensor:
        far(x)
        return x @ getattr(self, "first").weight @ getattr(self.second, "weight")  # noqa: B009


class InALoop(Untraced):
    def forward(self, x: Tensor) -> Tensor:
        far(x)
        for block in self.blocks[:1]:
            x = x @ block.weight  # type: ignore[operator]
        return x


class InAMethod(Untraced):
    @property
    def matrix(self) -> Tensor:
        return self.second.weight

    def multiply(self, x: Tensor) -> Tensor:
        return x @ self.matrix

    def forward(self, x: Tensor) -> Tensor:
        far(x)
        return self.multiply(x)


class InTheBase(InAMethod):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Enumerated(Untraced):
    def forward(self, x: Tensor) -> Tensor:
        far(x)
        return sum(x @ layer.weight for layer in list(self.children())[:2])  # type: ignore[operator,return-value]


READS: dict[type[Untraced], set[str]] = {
    Direct: {"first"},
    Described: set(),
    Alias: {"first", "second", "inner.deep"},
    ByString: {"first", "second"},
    InALoop: {"blocks.0", "blocks.1.0"},
    InAMethod: {"second"},
    InTheBase: {"second"},
    Enumerated: {"first", "second", "blocks.0", "blocks.1.0", "inner.deep", "wide.0"},
}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("cls", READS, ids=lambda cls: cls.__name__)
def test_layers_read(cls: type[Untraced]) -> None:
    model = cls()
    assert layers_read(model, linear_layers(model)) == READS[cls]


def test_without_source_all_that_is_named_may_be_read() -> None:
    scope: dict[str, Any] = {"Untraced": Untraced}
    exec("class Hidden(Untraced):\n  def forward(self, x):\n    return self.second(x @ self.first.weight)", scope)
    model = scope["Hidden"]()
    assert layers_read(model, linear_layers(model)) == {"first", "second"}


def test_names_of_base_classes_count_where_super_leads_to_them() -> None:
    assert {"multiply", "matrix", "second", "weight"} <= forward_names(InTheBase())


@pytest.mark.parametrize("cls", [Direct, Described], ids=lambda cls: cls.__name__)
def test_members_of_an_unseen_forward_are_exact(cls: type[Untraced]) -> None:
    model, x = cls(), torch.randn(3, 4)
    bnn = bayesify(model, members=2, init="normal", exclude=["blocks.*", "inner.*", "wide.*"])
    assert ("may be read in the model" in bnn.report.skipped.get("first", "")) == (cls is Direct)
    assert "second" in bnn.report.converted
    outputs = bnn.predict(x).outputs
    for k in range(2):
        torch.testing.assert_close(outputs[k, 0], bnn.merge(k)(x))
