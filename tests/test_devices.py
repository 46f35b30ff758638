"""What other devices do differently, done on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import rnn
from torch.utils._python_dispatch import TorchDispatchMode

from bayesify import bayesify
from bayesify.modes import full_float32


def _rounds() -> bool:
    """Whether cuDNN would round what convolutions multiply; so it does if nobody says otherwise."""
    if hasattr(torch.backends.cudnn, "conv"):
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return torch.backends.cudnn.allow_tf32


class TensorFloat32(TorchDispatchMode):
    """Convolutions of numbers of ten digits, as on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and _rounds():
            args = (_rounded(args[0]), _rounded(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def _rounded(value: Tensor) -> Tensor:
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Images(nn.Module):
    """Convolutions and norms that are neither timm's nor transformers'."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [3, 8, 8, 8, 8, 8, 8]
        layers = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairwise(sizes)]
        self.body = nn.Sequential(*(layer for three in layers for layer in three))
        self.head = nn.Linear(8 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


@pytest.mark.parametrize("rounding", [False, True], ids=["exact", "rounded"])
def test_checks_compare_in_full_precision(rounding: bool) -> None:
    assert _rounds()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    with TensorFloat32() if rounding else nullcontext():
        bnn = bayesify(Images(), members=4).eval()
        first = bnn(x)
        fused = bnn.fuse(weights="copies", example_inputs=x)
        assert len(fused.norms) == 6
        assert torch.allclose(fused(x), first, atol=1e-2)
    assert _rounds()
    with full_float32(), TensorFloat32():
        exact = bnn(x)
    assert torch.equal(exact, bnn(x))
    assert torch.equal(first, exact) != rounding


@pytest.fixture
def precision() -> Iterator[None]:
    """Settings as they were, afterwards."""
    yield
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        for holder in (backends.cuda.matmul, backends.mkldnn.matmul):
            holder.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True


SETTINGS: dict[str, Callable[[Any], None]] = {
    "none": lambda _: None,
    "matmul": lambda _: torch.set_float32_matmul_precision("high"),
    "halves": lambda _: torch.set_float32_matmul_precision("medium"),
    "exact": lambda backends: setattr(backends.cudnn, "allow_tf32", False),
    "newer": lambda backends: setattr(backends.cudnn.conv, "fp32_precision", "ieee"),
    "newer-both": lambda b: [setattr(x, "fp32_precision", "tf32") for x in (b.cudnn.conv, b.cuda.matmul)] and None,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.usefixtures("precision")
def test_settings_of_precision_come_back(setting: str) -> None:
    backends: Any = torch.backends
    if setting.startswith("newer") and not hasattr(backends.cudnn, "conv"):
        pytest.skip("torch before 2.9 has one way to say it")
    SETTINGS[setting](backends)

    def state() -> list[Any]:
        found = []
        for read in (
            torch.get_float32_matmul_precision,
            lambda: backends.cudnn.allow_tf32,
            lambda: backends.cuda.matmul.allow_tf32,
            lambda: [x.fp32_precision for x in (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)],
        ):
            try:
                found.append(read())
            except (RuntimeError, AttributeError) as error:
                found.append(type(error))
        return found

    before = state()
    with full_float32():
        assert not _rounds()
        if not setting.startswith("newer"):
            # torch's own code looks at both, and would not have them differ.
            assert torch.get_float32_matmul_precision() == "highest"
            assert not backends.cudnn.allow_tf32
            assert not backends.cuda.matmul.allow_tf32
    assert state() == before


def test_merging_layers_with_code_of_their_own_under_rounding() -> None:
    torch.manual_seed(0)
    bnn = bayesify(timm.create_model("tf_efficientnet_lite0", num_classes=5).eval(), members=2).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = bnn.predict(x).outputs[1, 0]
    with TensorFloat32():
        merged = bnn.merge(1).eval()
    assert torch.allclose(merged(x), expected, rtol=1e-3, atol=1e-4)


class Sequences(nn.Module):
    """A dense layer before a recurrent one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(6, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0][:, -1])


@pytest.fixture
def backward_in_evaluation(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether cuDNN was on in calls of the fused kernel that it has no gradients for."""
    found: list[bool] = []

    class Functions:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch._VF, name)  # type: ignore[attr-defined]

        @staticmethod
        def lstm(*args: Any) -> Any:
            output = torch._VF.lstm(*args)  # type: ignore[attr-defined]
            training = args[6]
            if output[0].requires_grad and not training:
                found.append(torch.backends.cudnn.enabled)
            return output

    monkeypatch.setattr(rnn, "_VF", Functions())
    return found


@pytest.mark.parametrize("exclude", [(), ("rnn",)], ids=["with-factors", "plain"])
def test_recurrent_layers_have_gradients_in_evaluation(
    exclude: tuple[str, ...], backward_in_evaluation: list[bool]
) -> None:
    bnn = bayesify(Sequences(), members=4, exclude=exclude, example_inputs=torch.randn(2, 5, 6), task="classification")
    bnn.fit_spread([torch.randn(3, 5, 6)], "fisher")
    assert backward_in_evaluation
    assert not any(backward_in_evaluation)
    assert torch.backends.cudnn.enabled


def test_compiled_convolutions_under_autocast() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.conv = nn.Linear(8, 8), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.dense(x)).mean((2, 3))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    for rank1 in ({}, {"perturbation": "additive"}):
        bnn = bayesify(Both(), members=2, init="normal", task="classification", **rank1).eval()
        with torch.autocast("cpu", torch.bfloat16):
            expected = bnn.predict(x).outputs
            bnn.compile(backend="eager")
            found = bnn.predict(x).outputs
        assert found.dtype == expected.dtype == torch.bfloat16
        assert torch.allclose(found.float(), expected.float(), atol=0.05)
