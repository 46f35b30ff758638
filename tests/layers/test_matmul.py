"""Products in oneDNN and as columns: equal to torch's own, for whatever lies in memory in whatever way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import bayesify
from bayesify.layers import PackedLinear, matmul

N, IN, OUT = 96, 64, 128  # enough multiplications for oneDNN

INPUTS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(N, IN),
    "columns": lambda: torch.randn(IN, N).t(),
    "three dimensions": lambda: torch.randn(4, N // 4, IN),
    "three dimensions, transposed": lambda: torch.randn(N // 4, 4, IN).transpose(0, 1),
    "a part of the rows": lambda: torch.randn(2 * N, IN)[::2],
    "a part of the columns": lambda: torch.randn(N, 2 * IN)[:, :IN],
    "every second column": lambda: torch.randn(N, 2 * IN)[:, ::2],
    "one row, expanded": lambda: torch.randn(1, IN).expand(N, IN),
}
WEIGHTS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(OUT, IN),
    "columns": lambda: torch.randn(IN, OUT).t(),
    "every second row": lambda: torch.randn(2 * OUT, IN)[::2],
}


@pytest.fixture(autouse=True)
def in_onednn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """oneDNN takes part, on whatever processor; gives the numbers of rows that it got."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(matmul, "has_wider_onednn", lambda: True)
    rows: list[int] = []
    is_matrix = matmul._is_matrix

    def noted(value: Tensor) -> bool:
        rows.append(len(value))
        return is_matrix(value)

    monkeypatch.setattr(matmul, "_is_matrix", noted)
    return rows


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_equals_linear(inputs: str, weight: str, with_bias: bool, in_onednn: list[int]) -> None:
    torch.manual_seed(0)
    x, w, b = INPUTS[inputs](), WEIGHTS[weight](), torch.randn(OUT) if with_bias else None
    found = matmul.linear(x, w, b)
    expected = F.linear(x.double(), w.double(), None if b is None else b.double()).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert in_onednn[:1] == [N]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_a_packed_weight_gives_the_same(inputs: str, weight: str) -> None:
    torch.manual_seed(0)
    x, w = INPUTS[inputs](), WEIGHTS[weight]()
    packed = matmul.packed(w, x)
    assert packed.is_mkldnn
    expected = F.linear(x.double(), w.double()).float()
    torch.testing.assert_close(matmul.linear(x, packed), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(matmul.linear(x[:2], packed), expected[:2], rtol=1e-5, atol=1e-4)


def test_weights_of_other_products_are_not_packed() -> None:
    x, w = torch.randn(N, IN), torch.randn(OUT, IN)
    assert matmul.packed(w, x[:1]) is w  # too few
    doubles = w.double()
    assert matmul.packed(doubles, x.double()) is doubles


def test_other_tensors_are_multiplied_by_torch(in_onednn: list[int]) -> None:
    x, w = torch.randn(N, IN), torch.randn(OUT, IN)
    assert torch.equal(matmul.linear(x.double(), w.double()), F.linear(x.double(), w.double()))
    assert torch.equal(matmul.linear(x[:1], w), F.linear(x[:1], w))  # too few
    trained = nn.Parameter(w)
    (grad,) = torch.autograd.grad(matmul.linear(x, trained).sum(), trained)
    torch.testing.assert_close(grad, x.sum(0).expand(OUT, IN))
    of_each = torch.func.vmap(matmul.linear, (None, 0))(x, torch.stack([w, 2 * w]))
    torch.testing.assert_close(of_each[1], 2 * of_each[0])
    assert not in_onednn


FEW: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(8, IN),
    "columns": lambda: torch.randn(IN, 8).t(),
    "three dimensions": lambda: torch.randn(4, 3, IN),
    "three dimensions, transposed": lambda: torch.randn(3, 4, IN).transpose(0, 1),
    "one row, expanded": lambda: torch.randn(1, IN).expand(24, IN),
}


@pytest.fixture
def by_columns(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """BLAS is as wide, and every weight large; gives the inputs that were multiplied as columns."""
    monkeypatch.setattr(matmul, "has_wider_onednn", lambda: False)
    monkeypatch.setattr(matmul, "has_onednn_on_amd", lambda: False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(matmul, "LARGE_WEIGHT", IN * OUT)
    inputs: list[Tensor] = []
    own = matmul._by_columns

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inputs.append(x)
        return own(x, weight, bias)

    monkeypatch.setattr(matmul, "_by_columns", noted)
    return inputs


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("inputs", FEW)
def test_few_rows_as_columns(inputs: str, with_bias: bool, by_columns: list[Tensor]) -> None:
    torch.manual_seed(0)
    x, w, b = FEW[inputs](), torch.randn(OUT, IN), torch.randn(OUT) if with_bias else None
    found = matmul.linear(x, w, b)
    expected = F.linear(x.double(), w.double(), None if b is None else b.double()).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert found.is_contiguous(), "networks look at it in another shape"
    assert len(by_columns) == 1


def test_other_products_are_not_of_columns(by_columns: list[Tensor]) -> None:
    x, w = torch.randn(8, IN), torch.randn(OUT, IN)
    for rows in (x[:7], x.repeat(4, 1)):
        assert torch.equal(matmul.linear(rows, w), F.linear(rows, w))
    for weight in (w[1:], torch.randn(IN, OUT).t(), nn.Parameter(w)):  # small, transposed, with a gradient
        assert torch.equal(matmul.linear(x, weight), F.linear(x, weight))
    assert torch.equal(matmul.linear(x.double(), w.double()), F.linear(x.double(), w.double()))
    assert not by_columns


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 64, 65])
def test_few_rows_without_the_widest_instructions_on_amd(
    rows: int, in_onednn: list[int], by_columns: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "has_onednn_on_amd", lambda: True)
    monkeypatch.setattr(matmul, "SMALLEST", IN * OUT)
    torch.manual_seed(0)
    x, w, b = torch.randn(rows, IN), torch.randn(OUT, IN), torch.randn(OUT)
    expected = F.linear(x.double(), w.double(), b.double()).float()
    torch.testing.assert_close(matmul.linear(x, w, b), expected, rtol=1e-5, atol=1e-4)
    assert (len(by_columns), len(in_onednn) > 0) == (rows in (2, 7), rows in (8, 64))
    small = w[1:]
    torch.testing.assert_close(matmul.linear(x, small, b[1:]), expected[:, 1:], rtol=1e-5, atol=1e-4)
    assert (len(by_columns), len(in_onednn) > 0) == (rows in (2, 7), rows in (8, 64)), "a small weight is torch's"


@pytest.mark.parametrize("on_amd", [False, True])
def test_torch_says_which_sizes_do_not_fit(on_amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "has_onednn_on_amd", lambda: on_amd)
    for name in ("SMALLEST", "LARGE_WEIGHT"):
        monkeypatch.setattr(matmul, name, 1)
    for wider in (False, True):
        monkeypatch.setattr(matmul, "has_wider_onednn", lambda wider=wider: wider)
        for inputs in (0, 3):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                matmul.linear(torch.randn(8, inputs), torch.randn(OUT, IN))


def test_a_layer_exports_as_a_plain_one() -> None:
    layer = nn.Linear(IN, OUT)
    x = torch.randn(N, IN)
    expected = layer(x)
    layer.__class__ = PackedLinear
    exported = torch.export.export(layer, (x,))
    assert "mkldnn" not in str(exported.graph)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(exported.module()(x), expected)


@pytest.mark.parametrize(
    ("text", "maker"), [("processor\t: 0\nvendor_id\t: AuthenticAMD\n", "AuthenticAMD"), ("CPU part\t: 0xd40\n", "")]
)
def test_the_maker_of_a_processor(text: str, maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert matmul._maker() == maker


@pytest.mark.parametrize("shape", [(IN,), (3, IN)], ids=["rows", "positions"])
@pytest.mark.parametrize("few", [False, True], ids=["oneDNN", "columns"])
def test_outputs_may_be_changed_in_place(few: bool, shape: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    noted: list[Any] = request.getfixturevalue("by_columns" if few else "in_onednn")
    x = torch.randn(4 if few else 48, *shape)
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        bnn = bayesify(nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(inplace)), members=2).train()
        bnn(x).sum().backward()
        found.append([parameter.grad for parameter in bnn.parameters()])
    assert noted
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
