"""The scan of an LSTM as one operation, against the loop over its steps."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesify import bayesify
from bayesify.layers import matmul
from bayesify.layers import scan as module
from bayesify.layers.scan import PACKED_STEPS, TRANSPOSED_ROWS, scan, signs

T, N, H = 5, 3, 4


def operands(draws: int, steps: int = T, dtype: torch.dtype = torch.float64, rows: int = N) -> list[Tensor]:
    shapes = [(steps, rows, 4 * H), (4 * H, H), (draws, H), (draws, 4 * H), (rows, H), (rows, H)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def scanned(reverse: bool, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, s, r, h, c = tensors
    of_gates = signs(H, x)
    r = of_gates.unsqueeze(0) if r is None else r * of_gates
    output, (h, c) = scan(x * of_gates, weight, s, r, (h, c), reverse)
    return output, h, c


def looped(reverse: bool, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, s, r, h, c = tensors
    outputs = []
    for step in reversed(x.unbind()) if reverse else x.unbind():
        y = (h if s is None else h * s) @ weight.t()
        i, f, g, o = (step + (y if r is None else y * r)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs), h, c


def gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((y.sin().sum() for y in outputs), torch.zeros(())), inputs)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("draws", [1, N])
@pytest.mark.parametrize("steps", [1, 2, T])
@pytest.mark.parametrize("missing", [(), (2,), (3,), (2, 3)], ids=["both", "no-s", "no-r", "neither"])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 4, 5)], ids=["all", "weight-frozen", "factors-only"])
def test_values_and_gradients(
    reverse: bool, draws: int, steps: int, missing: tuple[int, ...], frozen: tuple[int, ...], monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", steps * N * 4 * H * 8)
    inputs: list[Any] = operands(draws)
    for index in missing:
        inputs[index] = None
    for index in frozen:
        inputs[index] = inputs[index].detach()
    trained = [t for t in inputs if t is not None and t.requires_grad]
    expected = looped(reverse, *inputs)
    with torch.no_grad():
        torch.testing.assert_close(scanned(reverse, *inputs), expected)
    found = scanned(reverse, *inputs)
    torch.testing.assert_close(found, expected)
    if trained:
        torch.testing.assert_close(gradients(found, trained), gradients(expected, trained))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("rows", [N, TRANSPOSED_ROWS], ids=["few-rows", "many-rows"])
@pytest.mark.parametrize("wider", [False, True], ids=["blas", "onednn"])
def test_many_steps_in_single_precision(reverse: bool, rows: int, wider: bool, monkeypatch: Any) -> None:
    """Whose weight is laid out anew for all steps."""
    if wider and not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    monkeypatch.setattr(matmul, "has_wider_onednn", lambda: wider)
    monkeypatch.setattr(matmul, "has_onednn_on_amd", lambda: wider)
    monkeypatch.setattr(matmul, "SMALLEST", 0)
    inputs = operands(rows, PACKED_STEPS, torch.float32, rows)
    expected = looped(reverse, *inputs)
    with torch.no_grad():
        torch.testing.assert_close(scanned(reverse, *inputs), expected)
    found = scanned(reverse, *inputs)
    torch.testing.assert_close(found, expected)
    again = gradients(found, inputs), gradients(scanned(reverse, *inputs), inputs)
    for of_found, repeated, of_expected in zip(*again, gradients(expected, inputs), strict=True):
        torch.testing.assert_close(of_found, of_expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(of_found, repeated)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradients_of_gradients(reverse: bool) -> None:
    # Along random directions.
    assert torch.autograd.gradgradcheck(partial(scanned, reverse), operands(N), fast_mode=True)


@pytest.mark.parametrize("examples", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=["forward", "both-directions"])
def test_few_and_more_examples_are_predicted_alike(examples: int, options: dict[str, Any]) -> None:
    """With few rows a draw all are scanned at once, with more each draw is folded."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True, **options)
            self.head = nn.Linear(8 if options else 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0].mean(1))

    bnn = bayesify(Network(), members=2).eval()
    x = torch.randn(examples, PACKED_STEPS, 3)
    with torch.no_grad():
        probabilities = torch.stack([bnn.merge(member)(x).softmax(-1) for member in range(2)])
        torch.testing.assert_close(bnn(x), probabilities.mean(0).log())
    assert not torch.allclose(probabilities[0], probabilities[1], atol=1e-4)


def test_training_keeps_no_more_than_the_fused_kernel() -> None:
    def kept(model: nn.Module, x: Tensor) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(x)
        return sum(sizes.values())

    plain = nn.LSTM(16, 32, num_layers=2, batch_first=True)
    bnn = bayesify(copy.deepcopy(plain), members=2).train()
    x = torch.randn(8, 32, 16)
    assert kept(bnn, x) < 1.15 * kept(plain, x.repeat(2, 1, 1))
