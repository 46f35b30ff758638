"""The six promises of the library, each over the whole model table."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CASES, Case, tensor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bayesify import BayesianModel, BayesifyError, ConversionError, Rank1Layer, bayesify, rank1

BY_NAME = {case.name: case for case in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def some_cases(*names: str) -> Any:
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=lambda case: case.name)


def spread_out(case: Case, members: int = 2, **options: Any) -> BayesianModel:
    """A conversion whose members differ clearly from each other and from the base."""
    model = case.model()
    torch.manual_seed(7)
    return bayesify(model, members=members, init="normal", init_scale=0.3, **options).eval()


def call(model: nn.Module, case: Case) -> Tensor:
    args, kwargs = case.example()
    return tensor(model(*args, **kwargs))


def outputs(bnn: BayesianModel, case: Case, **options: Any) -> Tensor:
    """[K, S, B, ...] of predict."""
    args, kwargs = case.example()
    return bnn.predict(*args, **kwargs, **options).outputs


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())


# ------------------------------------------------------------------------------------------------ 1 identity


@every_case
@pytest.mark.parametrize(
    ("posterior", "samples"),
    [("deterministic", None), ("normal", None), ("normal", 2)],
    ids=["deterministic", "posterior-mean", "drawn-at-spread-0"],
)
def test_members_at_one_reproduce_the_network(case: Case, posterior: Any, samples: int | None) -> None:
    model = case.model()
    with torch.no_grad():
        expected = call(model, case)
    bnn = bayesify(model, members=3, init="ones", posterior=posterior, posterior_scale=0.0)
    found = outputs(bnn, case, samples=samples, seed=0)
    assert found.shape[:2] == (3, samples or 1)
    for member in found.flatten(0, 1):
        # A softplus keeps the spread above zero by 1e-7, far below the tolerance.
        assert relative_error(member, expected) <= case.tolerance


@every_case
@pytest.mark.parametrize("posterior", ["deterministic", "normal"])
def test_one_member_at_one_trains_like_the_network(case: Case, posterior: Any) -> None:
    base = case.model().train()
    with_dropout(base)
    bnn = bayesify(copy.deepcopy(base), members=1, init="ones", posterior=posterior, posterior_scale=0.0)
    assert bnn.training
    torch.manual_seed(3)
    expected = call(base, case)
    after = torch.rand(())
    torch.manual_seed(3)
    args, kwargs = case.example_after_seed(3) if hasattr(case, "example_after_seed") else case.example()
    found = tensor(bnn(*args, **kwargs))
    assert relative_error(found.detach(), expected.detach()) <= case.tolerance
    if posterior == "deterministic":
        assert torch.equal(torch.rand(()), after), "the random stream ran as in the original"
    statistics = dict(bnn.model.named_buffers())
    for name, buffer in base.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(statistics[name], buffer, rtol=1e-4, atol=1e-5)


def with_dropout(model: nn.Module) -> None:
    """Dropout somewhere in every model that has a dropout layer, so that its random numbers matter."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p == 0.0:
            module.p = 0.2
