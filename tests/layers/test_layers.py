"""Every layer against a plain loop over rows: fold one row's draw into the weights, call torch's own layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bayesify import BayesianModel, BayesifyError, Rank1Layer, bayesify
from bayesify.graph import site_name

B, K = 3, 2
both_noises = pytest.mark.parametrize("noise", ["example", "member"])


def convert(layer: nn.Module, noise: Any, **options: Any) -> BayesianModel:
    torch.manual_seed(5)
    return bayesify(layer, members=K, noise=noise, init_scale=0.3, posterior_scale=0.1, **options).train()


def folded_rows(bnn: BayesianModel) -> list[dict[str, Tensor]]:
    """For each row of the expanded batch, the layer's parameters with that row's draw folded in, differentiably."""
    layer = bnn.model
    draws = {(name, side): factor.value() for name, side, factor in bnn.factors()}
    rows = []
    for row in range(K * B):
        parameters = {n: p for n, p in layer.named_parameters() if not n.startswith("rank1.")}
        for weight in layer.rank1:
            s, r = (draws[site_name("", weight), side] for side in ("s", "r"))
            index = row if s.shape[0] == K * B else row // B
            parameters[weight] = fold(layer, parameters[weight], s[index], r[index])
        rows.append(parameters)
    return rows


def fold(layer: nn.Module, weight: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """W ∘ (r sᵀ), block by block."""
    if type(layer).__name__ == "Rank1Conv1D":
        return weight * torch.outer(s, r)
    groups = getattr(layer, "groups", 1)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    blocks = []
    for block, s_block, r_block in zip(weight.chunk(groups), s.chunk(groups), r.chunk(groups), strict=True):
        outer = torch.outer(s_block, r_block) if transposed else torch.outer(r_block, s_block)
        blocks.append(block * outer.view(*outer.shape, *[1] * (weight.dim() - 2)))
    return torch.cat(blocks)


def check_gradients(found: list[Tensor], expected: list[Tensor], bnn: BayesianModel, *inputs: Tensor) -> None:
    """Equal values, and equal gradients of a random projection, of inputs, slow weights and factors alike."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    projections = [torch.randn_like(a) for a in found]
    sources = [x for x in inputs if x.requires_grad] + list(bnn.parameters())
    gradients = [
        torch.autograd.grad(
            sum((a * p).sum() for a, p in zip(values, projections, strict=True)),
            sources, retain_graph=True, allow_unused=True,
        )
        for values in (found, expected)
    ]  # fmt: skip
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, b.abs().max().item()))
    assert any(g is not None and bool(g.abs().max() > 0) for g in gradients[0])


def check_layer(layer: nn.Module, x: Tensor, noise: Any, **kwargs: Any) -> None:
    plain = copy.deepcopy(layer)
    bnn = convert(layer, noise)
    assert type(bnn.model) is not type(plain)
    assert isinstance(bnn.model, type(plain))
    x.requires_grad_()
    found = bnn(x, **kwargs)
    rows = [
        torch.func.functional_call(plain, parameters, (x[row % B][None],), kwargs)
        for row, parameters in enumerate(folded_rows(bnn))
    ]
    assert not torch.allclose(rows[0], rows[B], atol=1e-3), "members differ"
    check_gradients([found], [torch.cat(rows)], bnn, x)


# ------------------------------------------------------------------------------------------------ dense


@both_noises
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=["vectors", "tokens", "maps"])
def test_linear(noise: Any, bias: bool, shape: tuple[int, ...]) -> None:
    check_layer(nn.Linear(5, 7, bias=bias), torch.randn(B, *shape, 5), noise)


@both_noises
@pytest.mark.parametrize("shape", [(), (4,)], ids=["vectors", "tokens"])
def test_transformers_conv1d(noise: Any, shape: tuple[int, ...]) -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(7, 5)
    nn.init.normal_(layer.bias)
    check_layer(layer, torch.randn(B, *shape, 5), noise)


@pytest.mark.parametrize("windows", [1, 4], ids=["once", "windows"])
def test_all_windows_of_an_example_share_its_draw(windows: int) -> None:
    """A layer may see a multiple of the batch, as after cutting images into windows."""

    class Windowed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    bnn = convert(Windowed(), "example")
    x = torch.randn(B, 1, 5).expand(B, windows, 5)
    found = bnn(x)
    for window in range(windows):
        assert torch.allclose(found[:, window], found[:, 0], atol=1e-6)
    assert not torch.allclose(found[0], found[B])


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 5), (4,)),
        (nn.Conv2d(4, 5, 3), (4, 6, 6)),
        (nn.Conv2d(4, 5, 3, padding="same", padding_mode="circular"), (4, 6, 6)),
        (nn.LSTM(4, 5, batch_first=True), (6, 4)),
        (nn.GRU(4, 5, batch_first=True), (6, 4)),
        (nn.GRUCell(4, 5), (4,)),
        (nn.MultiheadAttention(4, 2, batch_first=True), (6, 4)),
        (Matrix(), (4,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_inputs_of_other_sizes_are_refused_and_not_spread(
    layer: nn.Module, shape: tuple[int, ...], channels: int
) -> None:
    """A single channel times the elements of s would have the right size."""
    bnn = bayesify(copy.deepcopy(layer), members=K, init_scale=0.3)
    copies = 3 if isinstance(layer, nn.MultiheadAttention) else 1
    right = torch.randn(B, *shape)
    wrong = right.narrow(shape.index(4) + 1, 0, channels)
    bnn.eval()(*[right] * copies)
    for mode in (True, False):
        with pytest.raises((ValueError, RuntimeError, AssertionError)):
            bnn.train(mode)(*[wrong] * copies)


def test_rows_that_fit_no_draw_are_refused() -> None:
    bnn = convert(nn.Sequential(nn.Linear(5, 3)), "example")
    bnn(torch.randn(B, 5))
    with pytest.raises(BayesifyError, match=r"got 4 rows, which is no multiple of the 6 rows"):
        bnn.model(torch.randn(4, 5))


# ------------------------------------------------------------------------------------------------ convolutions

CLASSES = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), (4, 9)),
    "1d-stride-groups": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "2d-no-bias": (lambda: nn.Conv2d(4, 6, (3, 2), bias=False), (4, 7, 6)),
    "2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 7, 6)),
    "2d-depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 7, 6)),
    "2d-depthwise-multiplier": (lambda: nn.Conv2d(4, 12, 3, groups=4, stride=2), (4, 7, 6)),
    "2d-pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 7, 6)),
    "2d-timm-same": (lambda: Conv2dSame(4, 6, 3, stride=2), (4, 7, 6)),
    "2d-timm-same-depthwise": (lambda: Conv2dSame(4, 4, (5, 3), stride=2, groups=4, bias=False), (4, 8, 7)),
    "2d-dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), (4, 7, 6)),
    "2d-stride": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 3), padding=(1, 0)), (4, 7, 6)),
    "2d-same": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=2), (4, 7, 8)),
    "2d-valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (4, 7, 6)),
    "2d-same-circular": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (4, 7, 6)),
    "3d": (lambda: nn.Conv3d(4, 6, 2, groups=2, stride=2), (4, 4, 4, 4)),
    **{
        f"{n}d-{mode}": (
            lambda n=n, mode=mode: CLASSES[n](4, 6, 3, padding=2, groups=2, padding_mode=mode),
            (4, *[4] * n),
        )
        for n in (1, 2, 3)
        for mode in ("zeros", "reflect", "replicate", "circular")
    },
    "transposed-1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1), (4, 5)),
    "transposed-2d": (lambda: nn.ConvTranspose2d(4, 6, 3, bias=False), (4, 5, 4)),
    "transposed-2d-groups": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (4, 5, 4)),
    "transposed-2d-depthwise": (lambda: nn.ConvTranspose2d(4, 8, 3, groups=4), (4, 5, 4)),
    "transposed-2d-output-padding": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (4, 5, 4)),
    "transposed-2d-dilation": (lambda: nn.ConvTranspose2d(4, 6, 3, dilation=2, padding=1), (4, 5, 4)),
    "transposed-3d": (lambda: nn.ConvTranspose3d(4, 6, 2, groups=2), (4, 3, 3, 3)),
}  # fmt: skip


@both_noises
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, noise: Any) -> None:
    build, shape = CONVOLUTIONS[name]
    check_layer(build(), torch.randn(B, *shape), noise)


@both_noises
@pytest.mark.parametrize("size", [(9, 8), (10, 7)], ids=str)
def test_transposed_convolution_with_output_size(noise: Any, size: tuple[int, int]) -> None:
    check_layer(
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), torch.randn(B, 4, 5, 4), noise, output_size=list(size)
    )


def test_convolution_without_a_batch_dimension_is_refused() -> None:
    bnn = convert(nn.Sequential(nn.Conv2d(4, 6, 3)), "example")
    with pytest.raises(BayesifyError, match="Add the batch dimension"):
        bnn.model(torch.randn(4, 5, 5))


# ------------------------------------------------------------------------------------------------ recurrent

RECURRENT: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(4, 5),
    "lstm-batch-first": lambda: nn.LSTM(4, 5, batch_first=True),
    "lstm-layers": lambda: nn.LSTM(4, 5, num_layers=3),
    "lstm-bidirectional": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True),
    "lstm-projected": lambda: nn.LSTM(4, 5, num_layers=2, proj_size=3),
    "lstm-projected-bidirectional": lambda: nn.LSTM(4, 5, num_layers=2, proj_size=2, bidirectional=True),
    "lstm-no-bias": lambda: nn.LSTM(4, 5, num_layers=2, bias=False),
    "lstm-dropout": lambda: nn.LSTM(4, 5, num_layers=2, dropout=1.0),
    "gru": lambda: nn.GRU(4, 5),
    "gru-bidirectional": lambda: nn.GRU(4, 5, num_layers=2, bidirectional=True, batch_first=True),
    "gru-no-bias": lambda: nn.GRU(4, 5, bias=False),
    "gru-dropout": lambda: nn.GRU(4, 5, num_layers=2, dropout=1.0),
    "rnn-tanh": lambda: nn.RNN(4, 5, num_layers=2),
    "rnn-relu": lambda: nn.RNN(4, 5, num_layers=2, nonlinearity="relu", bidirectional=True),
    "rnn-no-bias": lambda: nn.RNN(4, 5, bias=False, batch_first=True),
}
"""A dropout of 1 between layers is one that a loop over rows can reproduce."""

INPUTS = ["plain", "packed", "packed-sorted"]


def rows_of_lstm(
    plain: nn.RNNBase, rows: list[dict[str, Tensor]], parts: list[Any], state: Any
) -> tuple[list[Any], Any]:
    """Outputs [T_row, d] and final states of each row by torch's own layer."""
    outputs, finals = [], []
    for row, (parameters, part) in enumerate(zip(rows, parts, strict=True)):
        layer = copy.copy(plain)
        layer.__dict__["_flat_weights"] = [parameters[name] for name in plain._flat_weights_names]
        here = None if state is None else tuple(t[:, row % B][:, None].contiguous() for t in state)
        here = here[0] if here is not None and len(here) == 1 else here
        output, final = layer(part[None] if plain.batch_first else part[:, None], here)
        outputs.append(output.squeeze(0 if plain.batch_first else 1))
        finals.append(final if isinstance(final, tuple) else (final,))
    return outputs, [torch.cat(f, 1) for f in zip(*finals, strict=True)]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@both_noises
@pytest.mark.parametrize("given", [False, True], ids=["from-zero", "initial-state"])
@pytest.mark.parametrize("form", INPUTS)
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent(name: str, form: str, given: bool, noise: Any) -> None:
    plain = RECURRENT[name]()
    layers = plain.num_layers * (2 if plain.bidirectional else 1)
    state = None
    if given:
        state = [torch.randn(layers, B, plain.proj_size or 5)] + [torch.randn(layers, B, 5)] * isinstance(
            plain, nn.LSTM
        )
    lengths = {"plain": [6, 6, 6], "packed": [3, 6, 1], "packed-sorted": [6, 4, 1]}[form]
    x = torch.randn(B, 6, 4, requires_grad=True)
    bnn = convert(copy.deepcopy(plain), noise)
    value: Any = x if plain.batch_first else x.transpose(0, 1)
    if form != "plain":
        value = pack_padded_sequence(
            value, torch.tensor(lengths), batch_first=plain.batch_first, enforce_sorted=form == "packed-sorted"
        )
    hx = None if state is None else tuple(state) if len(state) > 1 else state[0]
    output, final = bnn(value, hx)
    assert isinstance(output, PackedSequence) == (form != "plain")
    if isinstance(output, PackedSequence):
        output, found_lengths = pad_packed_sequence(output, batch_first=plain.batch_first)
        assert found_lengths.tolist() == lengths * K
    output = output if plain.batch_first else output.transpose(0, 1)
    parts = [x[row % B, : lengths[row % B]] for row in range(K * B)]
    rows, finals = rows_of_lstm(plain, folded_rows(bnn), parts, state)
    found = [output[row, : lengths[row % B]] for row in range(K * B)]
    final = list(final) if isinstance(final, tuple) else [final]
    check_gradients([torch.cat(found), *final], [torch.cat(rows), *finals], bnn, x)


CELLS = {
    "lstm": lambda: nn.LSTMCell(4, 5),
    "lstm-no-bias": lambda: nn.LSTMCell(4, 5, bias=False),
    "gru": lambda: nn.GRUCell(4, 5),
    "gru-no-bias": lambda: nn.GRUCell(4, 5, bias=False),
    "rnn-tanh": lambda: nn.RNNCell(4, 5),
    "rnn-relu": lambda: nn.RNNCell(4, 5, nonlinearity="relu"),
}


class Unrolled(nn.Module):
    """A cell called once a time step: all steps share one draw."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, state: Any = None) -> Tensor:
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state


@both_noises
@pytest.mark.parametrize("given", [False, True], ids=["from-zero", "initial-state"])
@pytest.mark.parametrize("name", CELLS)
def test_cell(name: str, given: bool, noise: Any) -> None:
    plain = Unrolled(CELLS[name]())
    bnn = convert(copy.deepcopy(plain), noise)
    x = torch.randn(B, 4, 4, requires_grad=True)
    state: Any = None
    if given:
        state = (torch.randn(B, 5), torch.randn(B, 5)) if name.startswith("lstm") else torch.randn(B, 5)
    found = bnn(x, state)
    cell, rows = BayesianModel(bnn.model.cell, bnn.config, bnn.report), []
    for row, parameters in enumerate(folded_rows(cell)):
        i = slice(row % B, row % B + 1)
        here = tuple(t[i] for t in state) if isinstance(state, tuple) else None if state is None else state[i]
        folded = {f"cell.{weight}": value for weight, value in parameters.items()}
        rows.append(torch.func.functional_call(plain, folded, (x[i], here)))
    check_gradients([found], [torch.cat(rows)], bnn, x)


@pytest.mark.parametrize("layer", [nn.LSTM(4, 5), nn.GRUCell(4, 5)], ids=["layer", "cell"])
def test_recurrence_without_a_batch_dimension_is_refused(layer: nn.Module) -> None:
    bnn = convert(nn.ModuleList([layer]), "member")
    x = torch.randn(6, 4) if isinstance(layer, nn.LSTM) else torch.randn(4)
    with pytest.raises(BayesifyError, match="needs a batched input"):
        bnn.model[0](x)


# ------------------------------------------------------------------------------------------------ subclasses


class Standardized(nn.Conv2d):
    """Weight standardization: its own code makes the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / std, self.bias, padding=1)


@both_noises
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_operator_with_its_own_code(noise: Any, bias: bool) -> None:
    """y = r ∘ L(s ∘ x) + (1 − r) ∘ b, row by row, for whatever L makes of its weight."""
    plain = Standardized(4, 6, 3, bias=bias)
    bnn = convert(copy.deepcopy(plain), noise)
    assert isinstance(bnn.model, Standardized)
    x = torch.randn(B, 4, 5, 5, requires_grad=True)
    found = bnn(x)
    (s, r) = (factor.value() for _, _, factor in bnn.factors())
    parameters = {n: p for n, p in bnn.model.named_parameters() if not n.startswith("rank1.")}
    rows = []
    for row in range(K * B):
        index = row if noise == "example" else row // B
        y = torch.func.functional_call(plain, parameters, (x[row % B][None] * s[index].view(1, -1, 1, 1),))
        b = parameters["bias"] if bias else torch.zeros(6)
        rows.append((y - b.view(1, -1, 1, 1)) * r[index].view(1, -1, 1, 1) + b.view(1, -1, 1, 1))
    check_gradients([found], [torch.cat(rows)], bnn, x)


def test_subclass_without_its_own_forward_folds_like_its_base() -> None:
    class Named(nn.Linear):
        pass

    layer = Named(5, 7)
    plain = nn.Linear(5, 7)
    plain.load_state_dict(layer.state_dict())
    bnn = convert(layer, "example")
    assert isinstance(bnn.model, Named)
    assert bnn.report.converted == {"": "Named"}
    x = torch.randn(B, 5)
    found = bnn(x)
    rows = [torch.func.functional_call(plain, p, (x[i % B],)) for i, p in enumerate(folded_rows(bnn))]
    torch.testing.assert_close(found, torch.stack(rows))


@both_noises
def test_parametrized_layer(noise: Any) -> None:
    plain = parametrizations.weight_norm(nn.Linear(5, 7))
    bnn = convert(copy.deepcopy(plain), noise)
    x = torch.randn(B, 5)
    found = bnn(x)
    s, r = (factor.value() for _, _, factor in bnn.factors())
    for row in range(K * B):
        index = row if noise == "example" else row // B
        expected = F.linear(x[row % B] * s[index], plain.weight) * r[index] + plain.bias
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    merged = bnn.merge(1)
    torch.testing.assert_close(merged(x), bnn.predict(x).outputs[1, 0])


def test_spectral_norm_cannot_be_merged() -> None:
    from bayesify import ConversionError

    layer = parametrizations.spectral_norm(nn.Linear(5, 7)).eval()
    bnn = bayesify(layer, members=2, init_scale=0.3)
    with pytest.raises(ConversionError, match="cannot be folded"):
        bnn.merge(0)


class Reversed(nn.LSTM):
    """An LSTM with code of its own: it reads backwards."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        output, state = super().forward(input.flip(0), hx)
        return output.flip(0), state


@both_noises
def test_lstm_subclass_with_its_own_forward(noise: Any) -> None:
    plain = Reversed(4, 5)
    bnn = convert(copy.deepcopy(plain), noise)
    assert isinstance(bnn.model, Reversed)
    x = torch.randn(B, 6, 4, requires_grad=True)
    output, final = bnn(x.transpose(0, 1))
    rows, finals = rows_of_lstm(plain, folded_rows(bnn), [x[row % B] for row in range(K * B)], None)
    check_gradients([output.transpose(0, 1), *final], [torch.stack(rows), *finals], bnn, x)


class DoubledCell(nn.GRUCell):
    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        return super().forward(2 * input, hx)


@both_noises
def test_cell_subclass_with_its_own_forward(noise: Any) -> None:
    plain = DoubledCell(4, 5)
    bnn = convert(copy.deepcopy(plain), noise)
    x, state = torch.randn(B, 4, requires_grad=True), torch.randn(B, 5)
    found = bnn(x, state)
    rows = [
        torch.func.functional_call(plain, p, (x[row % B][None], state[row % B][None]))
        for row, p in enumerate(folded_rows(bnn))
    ]
    check_gradients([found], [torch.cat(rows)], bnn, x)


class LastOutput(nn.GRU):
    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        return super().forward(input, hx)[0][-1]


def test_lstm_subclass_with_another_output_is_refused() -> None:
    bnn = convert(LastOutput(4, 5), "member")
    with pytest.raises(BayesifyError, match=r"LastOutput does not return \(output, state\)"):
        bnn(torch.randn(6, 2, 4))


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Rectified(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Broken(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs a second input")


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Squared(4, 4), "Squared is not linear"),
        (Rectified(4, 4, 1), "Rectified is not linear"),
        (Broken(4, 4), "its own forward failed on a random input (RuntimeError: needs a second input)"),
    ],
    ids=["squared", "rectified", "broken"],
)
def test_subclass_that_is_not_linear_is_skipped_with_a_reason(layer: nn.Module, reason: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    bnn = bayesify(model, members=2)
    assert set(bnn.report.converted) == {"0"}
    assert reason in bnn.report.skipped["1"]
    assert not isinstance(model[1], Rank1Layer)


# ------------------------------------------------------------------------------------------------ low precision


@both_noises
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Linear(5, 7), (5,)),
        (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 5)),
        (lambda: nn.ConvTranspose1d(4, 6, 3), (4, 5)),
        (lambda: nn.LSTM(4, 5, batch_first=True), (6, 4)),
        (lambda: nn.GRU(4, 5, batch_first=True), (6, 4)),
    ],
    ids=["linear", "conv", "transposed", "lstm", "gru"],
)
def test_low_precision(build: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, noise: Any) -> None:
    bnn = convert(build(), noise)
    low = copy.deepcopy(bnn).to(dtype)
    x = torch.randn(B, *shape)
    found = []
    for network, value in ((bnn, x), (low, x.to(dtype))):
        torch.manual_seed(9)
        output = network(value)
        found.append(output[0] if isinstance(output, tuple) else output)
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[1].float(), found[0], rtol=0.05, atol=0.05)
    found[1].float().square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in low.parameters())
