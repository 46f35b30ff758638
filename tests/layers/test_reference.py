"""Dense, convolutional and recurrent layers against the paper's formulas, with loops over members and examples.

The reference is written out here, in float64, and knows nothing of the library's layers: it takes the weights, one row
of every draw and one example. A single converted layer is all that a network has here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bayesify import BayesianModel, bayesify
from bayesify.distributions import Factor
from bayesify.layers import MemberVector

B = 2
Draws = dict[tuple[str, str], Tensor]
"""{(weight, "s" | "r"): draw [K, d] or [K·B, d]}."""

every_size = pytest.mark.parametrize("members", [1, 3], ids=["K1", "K3"])
every_noise = pytest.mark.parametrize("noise", ["example", "member"])
every_perturbation = pytest.mark.parametrize("perturbation", ["multiplicative", "additive"])
every_factor = pytest.mark.parametrize("factors", ["both", "inputs", "outputs"])
with_and_without_own_biases = pytest.mark.parametrize("member_bias", [False, True], ids=["shared-bias", "own-bias"])

# ------------------------------------------------------------------------------------------------ the formulas


class Row:
    """The weights, and the row of every draw that belongs to one (member, example)."""

    def __init__(self, bnn: BayesianModel, draws: Draws, member: int, example: int) -> None:
        (layer,) = (layer for _, layer in bnn.layers())
        self.weights = {n: p for n, p in layer.named_parameters() if not n.startswith("rank1.")}
        self.additive = bnn.config.perturbation == "additive"
        self.draws, self.member, self.example, self.members = draws, member, example, bnn.members
        self.offsets = {
            weight: site.own_bias.offset.double()[member]
            for weight, site in layer.rank1.items()
            if site.own_bias is not None
        }

    def vector(self, weight: str, side: str, size: int) -> Tensor:
        """s [in] or r [out]; one that is absent changes nothing."""
        if (weight, side) not in self.draws:
            return torch.full((size,), 0.0 if self.additive else 1.0, dtype=torch.float64)
        draw = self.draws[weight, side]
        assert draw.shape in ((self.members, size), (self.members * B, size))
        return draw[self.member if draw.shape[0] == self.members else self.member * B + self.example].double()

    def bias(self, weight: str, size: int) -> Tensor:
        """b, the shared one plus what this member adds to it."""
        shared = self.weights.get(weight.replace("weight", "bias"))
        if shared is None:
            assert weight not in self.offsets, "a site without a bias has no bias of a member's own"
            return torch.zeros(size, dtype=torch.float64)
        return shared + self.offsets.get(weight, 0.0)

    def dense(self, weight: str, x: Tensor) -> Tensor:
        """r ∘ (W (s ∘ x)) + b, or W (x + s) + r + b, for one vector x [in]."""
        w = self.weights[weight]
        s, r = self.vector(weight, "s", w.shape[1]), self.vector(weight, "r", w.shape[0])
        entered = x + s if self.additive else x * s
        y = torch.stack([(row * entered).sum() for row in w])
        return (y + r if self.additive else y * r) + self.bias(weight, w.shape[0])

    def conv(self, x: Tensor, layer: nn.Conv1d | nn.Conv2d) -> Tensor:
        """The same for one image x [in, H, W], with sums written out position by position; the border holds zeros."""
        w = self.weights["weight"]
        (dy, dx), (py, px), (ay, ax) = layer.stride, layer.padding, layer.dilation
        outputs, per_group, height, width = w.shape
        s, r = self.vector("weight", "s", x.shape[0]), self.vector("weight", "r", outputs)
        entered = x + s[:, None, None] if self.additive else x * s[:, None, None]
        framed = x.new_zeros(x.shape[0], x.shape[1] + 2 * py, x.shape[2] + 2 * px)
        framed[:, py : py + x.shape[1], px : px + x.shape[2]] = entered
        bias, found = self.bias("weight", outputs), []
        for o in range(outputs):
            group = o // (outputs // layer.groups)
            seen = framed[group * per_group : (group + 1) * per_group]
            for top in range(0, framed.shape[1] - ay * (height - 1), dy):
                for left in range(0, framed.shape[2] - ax * (width - 1), dx):
                    patch = seen[:, top : top + ay * height : ay, left : left + ax * width : ax]
                    y = (w[o] * patch).sum()
                    found.append((y + r[o] if self.additive else y * r[o]) + bias[o])
        across = len(range(0, framed.shape[2] - ax * (width - 1), dx))
        return torch.stack(found).view(outputs, -1, across)

    def lstm_step(self, x: Tensor, h: Tensor, c: Tensor, end: str = "") -> tuple[Tensor, Tensor]:
        """z = ((x ∘ s_x) W_x) ∘ r_x + ((h ∘ s_h) W_h) ∘ r_h + b; gates i, f, g, o."""
        z = self.dense(f"weight_ih{end}", x) + self.dense(f"weight_hh{end}", h)
        size = c.shape[0]
        i, f, g, o = (z[gate * size : (gate + 1) * size] for gate in range(4))
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        return (self.dense(f"weight_hr{end}", h) if f"weight_hr{end}" in self.weights else h), c

    def cell_step(self, cell: nn.Module, x: Tensor, h: Tensor, end: str) -> Tensor:
        """One step of torch's own cell with W ∘ (r sᵀ), or with W s + r added to the biases."""
        folded: dict[str, Tensor] = {}
        for part in ("ih", "hh"):
            w = self.weights[f"weight_{part}{end}"]
            s = self.vector(f"weight_{part}{end}", "s", w.shape[1])
            r = self.vector(f"weight_{part}{end}", "r", w.shape[0])
            bias = self.bias(f"weight_{part}{end}", w.shape[0])
            folded[f"weight_{part}"] = w if self.additive else w * torch.outer(r, s)
            folded[f"bias_{part}"] = bias + w @ s + r if self.additive else bias
        return torch.func.functional_call(cell, folded, (x[None], h[None]))[0]

    def sequence(self, x: Tensor, layer: nn.RNNBase, state: tuple[Tensor, ...] | None = None) -> Tensor:
        """Outputs [T, directions · d] of one sequence x [T, in]; `state` holds [layers · directions, d] tensors."""
        lstm, directions = isinstance(layer, nn.LSTM), 2 if layer.bidirectional else 1
        cell = None if lstm else (nn.GRUCell if isinstance(layer, nn.GRU) else nn.RNNCell)(1, layer.hidden_size)
        for number in range(layer.num_layers):
            outputs = []
            for direction in range(directions):
                end = f"_l{number}" + "_reverse" * direction
                index = number * directions + direction
                h = x.new_zeros(layer.proj_size or layer.hidden_size) if state is None else state[0][index]
                c = x.new_zeros(layer.hidden_size) if state is None or not lstm else state[1][index]
                steps: dict[int, Tensor] = {}
                for t in reversed(range(len(x))) if direction else range(len(x)):
                    if cell is None:
                        h, c = self.lstm_step(x[t], h, c, end)
                    else:
                        h = self.cell_step(cell, x[t], h, end)
                    steps[t] = h
                outputs.append(torch.stack([steps[t] for t in range(len(x))]))
            x = torch.cat(outputs, 1)
        return x


# ------------------------------------------------------------------------------------------------ the comparison

Reference = Callable[[Row, Tensor], Tensor]
"""The outputs for one (member, example)."""


def convert(layer: nn.Module, members: int, **options: Any) -> BayesianModel:
    """A conversion in float64 with members that differ and, where they have biases of their own, differ there too."""
    torch.manual_seed(5)
    bnn = bayesify(layer.double(), members=members, init_scale=0.4, posterior_scale=0.2, **options).train()
    for module in bnn.modules():
        if isinstance(module, MemberVector):
            nn.init.normal_(module.offset)
    return bnn


def factors_of(bnn: BayesianModel) -> dict[tuple[str, str], Factor]:
    (layer,) = (layer for _, layer in bnn.layers())
    pairs = (((weight, side), getattr(site, side)) for weight, site in layer.rank1.items() for side in ("s", "r"))
    return {key: factor for key, factor in pairs if factor is not None}


def expected(bnn: BayesianModel, draws: Draws, examples: list[Tensor], reference: Reference) -> list[Tensor]:
    """One output a (member, example), member-major."""
    return [
        reference(Row(bnn, draws, member, example), examples[example])
        for member in range(bnn.members)
        for example in range(B)
    ]


def draws_in_force(bnn: BayesianModel) -> Draws:
    """The draws of the last training forward, differentiable by a formula of this file: loc + softplus(rho) ε."""
    draws: Draws = {}
    for key, factor in factors_of(bnn).items():
        value = factor.value().detach()
        rows = bnn.members * (B if factor.random and bnn.config.noise == "example" else 1)
        assert value.shape == (rows, factor.size)
        loc, each = factor.loc, rows // bnn.members
        redrawn = loc.repeat_interleave(each, 0)
        if factor.random:
            scale = torch.log1p(torch.exp(factor.rho)).repeat_interleave(each, 0)
            noise = ((value - redrawn) / scale).detach()
            assert noise.abs().max() > 0.1
            redrawn = redrawn + scale * noise
        torch.testing.assert_close(redrawn.detach(), value, rtol=1e-4, atol=1e-5)
        draws[key] = value.double() + (redrawn - redrawn.detach()).double()
    return draws


def check_training(bnn: BayesianModel, found: list[Tensor], examples: list[Tensor], reference: Reference) -> None:
    """Values of every (member, example) under the draws in force, and all gradients of a random projection."""
    wanted = expected(bnn, draws_in_force(bnn), examples, reference)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    projections = [torch.randn_like(a) for a in wanted]
    sources = {**dict(bnn.named_parameters()), **{f"example {i}": x for i, x in enumerate(examples) if x.requires_grad}}
    gradients = []
    for values in (found, wanted):
        loss = sum((a * p).sum() for a, p in zip(values, projections, strict=True))
        gradients.append(torch.autograd.grad(loss, list(sources.values()), retain_graph=True))  # type: ignore[arg-type]
    for name, a, b in zip(sources, *gradients, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


def check_predictions(bnn: BayesianModel, inputs: Any, examples: list[Tensor], reference: Reference) -> None:
    """Every member at its posterior mean, and under each of two draws, which are caught as they come into force."""
    with torch.no_grad():
        means: Draws = {key: factor.loc for key, factor in factors_of(bnn).items()}
        compare(bnn.predict(inputs).outputs[:, 0], expected(bnn, means, examples, reference))
        keys = {id(factor): key for key, factor in factors_of(bnn).items()}
        caught: dict[tuple[str, str], list[Tensor]] = {}
        hold = Factor.hold

        def catching(factor: Factor, draw: Tensor | None, *of_all: Any) -> None:
            if draw is not None:
                caught.setdefault(keys[id(factor)], []).append(draw.clone())
            hold(factor, draw, *of_all)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Factor, "hold", catching)
            outputs = bnn.predict(inputs, samples=2, seed=11).outputs
        assert all(len(draws) == 2 for draws in caught.values())
        for sample in range(2):
            draws = {key: both[sample] for key, both in caught.items()}
            assert draws.keys() == means.keys()
            compare(outputs[:, sample], expected(bnn, draws, examples, reference))
        assert not torch.allclose(outputs[:, 0], outputs[:, 1], atol=1e-3)


def compare(outputs: Tensor, wanted: list[Tensor]) -> None:
    """[K, B, ...] outputs against a list over (member, example)."""
    for found, value in zip(outputs.flatten(0, 1), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)


def check(layer: nn.Module, x: Tensor, reference: Reference, members: int, **options: Any) -> None:
    """Training and predictions for x [B, ...] and outputs with the batch in front."""
    bnn = convert(layer, members, **options)
    x = x.double().requires_grad_()
    examples = [part.detach().requires_grad_() for part in x]
    # The loss is of the examples' own leaves, so that its gradient reaches the same tensors on both sides.
    check_training(bnn, list(bnn(torch.stack(examples))), examples, reference)
    check_predictions(bnn, x.detach(), [part.detach() for part in examples], reference)


# ------------------------------------------------------------------------------------------------ dense


def dense_reference(row: Row, x: Tensor) -> Tensor:
    outputs = [row.dense("weight", vector) for vector in x.reshape(-1, x.shape[-1])]
    return torch.stack(outputs).view(*x.shape[:-1], -1)


@every_size
@every_noise
@every_perturbation
@every_factor
@with_and_without_own_biases
def test_dense(members: int, noise: Any, perturbation: Any, factors: Any, member_bias: bool) -> None:
    options = {"noise": noise, "perturbation": perturbation, "factors": factors, "member_bias": member_bias}
    check(nn.Linear(4, 3), torch.randn(B, 2, 4), dense_reference, members, **options)


@every_noise
@every_perturbation
@pytest.mark.parametrize("member_bias", [False, True])
def test_dense_without_bias(noise: Any, perturbation: Any, member_bias: bool) -> None:
    layer = nn.Linear(4, 3, bias=False)
    check(layer, torch.randn(B, 4), dense_reference, 3, noise=noise, perturbation=perturbation, member_bias=member_bias)


@every_size
@every_perturbation
def test_point_masses(members: int, perturbation: Any) -> None:
    """BatchEnsemble: training and prediction use the same vectors."""
    options = {"posterior": "deterministic", "perturbation": perturbation, "member_bias": True}
    bnn = convert(nn.Linear(4, 3), members, **options)
    examples = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(B)]
    found = bnn(torch.stack(examples))
    check_training(bnn, list(found), examples, dense_reference)
    outputs = bnn.predict(torch.stack(examples), samples=2, seed=0).outputs
    for sample in range(2):
        torch.testing.assert_close(outputs[:, sample].flatten(0, 1), found.detach(), rtol=0, atol=1e-12)


@every_noise
@every_perturbation
def test_members_in_chunks(noise: Any, perturbation: Any) -> None:
    bnn = convert(nn.Linear(4, 3), 3, noise=noise, perturbation=perturbation, member_bias=True)
    x = torch.randn(B, 4, dtype=torch.float64)
    whole = bnn.predict(x, samples=2, seed=3).outputs
    for chunk in (1, 2):
        found = bnn.predict(x, samples=2, seed=3, member_chunk=chunk).outputs
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)


@every_perturbation
def test_single_precision(perturbation: Any) -> None:
    bnn = convert(nn.Linear(4, 3), 3, perturbation=perturbation, member_bias=True)
    single = copy.deepcopy(bnn).float()
    x = torch.randn(B, 4)
    found = single.predict(x, samples=2, seed=1).outputs
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), bnn.predict(x.double(), samples=2, seed=1).outputs, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ convolution

CONVOLUTIONS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(2, 3, (2, 3)),
    "padding": lambda: nn.Conv2d(2, 3, 3, padding=(1, 2)),
    "stride": lambda: nn.Conv2d(2, 3, 2, stride=(2, 1), padding=1),
    "dilation": lambda: nn.Conv2d(2, 3, 2, dilation=(2, 3), padding=1),
    "groups": lambda: nn.Conv2d(4, 6, 2, groups=2, padding=1, stride=2),
    "depth-wise": lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1, stride=2, bias=False),
    "everything": lambda: nn.Conv2d(4, 2, 3, groups=2, padding=2, stride=2, dilation=2),
}


def check_convolution(layer: nn.Conv2d, members: int, **options: Any) -> None:
    plain = copy.deepcopy(layer)
    x = torch.randn(B, layer.in_channels, 4, 3 + (layer.padding[1] == 0))
    check(layer, x, lambda row, image: row.conv(image, plain), members, **options)


@every_noise
@every_perturbation
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str, noise: Any, perturbation: Any) -> None:
    check_convolution(CONVOLUTIONS[name](), 3, noise=noise, perturbation=perturbation, member_bias=True)


@every_size
@every_noise
@every_perturbation
@every_factor
@with_and_without_own_biases
def test_convolution_options(members: int, noise: Any, perturbation: Any, factors: Any, member_bias: bool) -> None:
    options = {"noise": noise, "perturbation": perturbation, "factors": factors, "member_bias": member_bias}
    check_convolution(nn.Conv2d(2, 2, 2, stride=2, padding=1), members, **options)


# ------------------------------------------------------------------------------------------------ recurrent

RECURRENT: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(3, 2, batch_first=True),
    "lstm-time-first": lambda: nn.LSTM(3, 2),
    "lstm-layers": lambda: nn.LSTM(3, 2, num_layers=2, batch_first=True),
    "lstm-bidirectional": lambda: nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True),
    "lstm-projected": lambda: nn.LSTM(3, 3, proj_size=2),
    "lstm-no-bias": lambda: nn.LSTM(3, 2, bias=False),
    "gru": lambda: nn.GRU(3, 2, batch_first=True),
    "gru-bidirectional": lambda: nn.GRU(3, 2, bidirectional=True),
    "rnn": lambda: nn.RNN(3, 2, num_layers=2),
}


def check_recurrent(layer: nn.RNNBase, members: int, **options: Any) -> None:
    plain, first = copy.deepcopy(layer), layer.batch_first
    bnn = convert(layer, members, **options)
    examples = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(B)]
    x = torch.stack(examples, 0 if first else 1)
    output = bnn(x)[0]
    output = output if first else output.transpose(0, 1)

    def reference(row: Row, sequence: Tensor) -> Tensor:
        return row.sequence(sequence, plain)

    check_training(bnn, list(output), examples, reference)
    check_predictions(bnn, x.detach(), [part.detach() for part in examples], reference)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@every_noise
@every_perturbation
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent(name: str, noise: Any, perturbation: Any) -> None:
    check_recurrent(RECURRENT[name](), 3, noise=noise, perturbation=perturbation, member_bias=True)


@every_size
@every_noise
@every_perturbation
@every_factor
@with_and_without_own_biases
def test_lstm_options(members: int, noise: Any, perturbation: Any, factors: Any, member_bias: bool) -> None:
    options = {"noise": noise, "perturbation": perturbation, "factors": factors, "member_bias": member_bias}
    check_recurrent(nn.LSTM(3, 2, batch_first=True), members, **options)


@every_noise
@every_perturbation
@pytest.mark.parametrize("first", [True, False], ids=["batch-first", "time-first"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU], ids=["lstm", "gru"])
@pytest.mark.parametrize("lengths", [(2, 4), (3, 3)], ids=["longer-last", "equal"])
def test_packed(lengths: tuple[int, int], kind: type[nn.RNNBase], first: bool, noise: Any, perturbation: Any) -> None:
    """Bidirectional, sequences of different lengths, a given initial state: the reverse begins at each one's end."""
    layer = kind(3, 2, bidirectional=True, batch_first=first)
    plain = copy.deepcopy(layer)
    bnn = convert(layer, 3, noise=noise, perturbation=perturbation, member_bias=True)
    examples = [torch.randn(length, 3, dtype=torch.float64, requires_grad=True) for length in lengths]
    padded = nn.utils.rnn.pad_sequence(examples, batch_first=first)
    packed = pack_padded_sequence(padded, torch.tensor(lengths), batch_first=first, enforce_sorted=False)
    state = tuple(torch.randn(2, B, 2, dtype=torch.float64) for _ in range(2 if kind is nn.LSTM else 1))
    output, final = bnn(packed, state if kind is nn.LSTM else state[0])
    assert isinstance(output, PackedSequence)
    output, found_lengths = pad_packed_sequence(output, batch_first=True)
    assert found_lengths.tolist() == list(lengths) * 3
    found = [output[row, : lengths[row % B]] for row in range(3 * B)]

    def reference(row: Row, sequence: Tensor) -> Tensor:
        return row.sequence(sequence, plain, tuple(part[:, row.example] for part in state))

    check_training(bnn, found, examples, reference)
    hidden = final[0] if kind is nn.LSTM else final
    ends = torch.stack([torch.stack([part[-1, :2], part[0, 2:]]) for part in found], 1)
    torch.testing.assert_close(hidden, ends, rtol=0, atol=1e-12)


class Unrolled(nn.Module):
    """A cell called once a time step, which gives all its hidden states."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


@every_size
@every_noise
@every_perturbation
@every_factor
def test_lstm_cell(members: int, noise: Any, perturbation: Any, factors: Any) -> None:
    def reference(row: Row, x: Tensor) -> Tensor:
        h = c = x.new_zeros(2)
        outputs = []
        for vector in x:
            h, c = row.lstm_step(vector, h, c)
            outputs.append(h)
        return torch.stack(outputs)

    options = {"noise": noise, "perturbation": perturbation, "factors": factors, "member_bias": True}
    check(Unrolled(nn.LSTMCell(3, 2)), torch.randn(B, 3, 3), reference, members, **options)


@every_noise
@every_perturbation
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.RNNCell], ids=["gru", "rnn"])
def test_other_cells(kind: type[nn.RNNCellBase], bias: bool, noise: Any, perturbation: Any) -> None:
    plain = kind(3, 2)

    def reference(row: Row, x: Tensor) -> Tensor:
        h, outputs = x.new_zeros(2), []
        for vector in x:
            h = row.cell_step(plain, vector, h, "")
            outputs.append(h)
        return torch.stack(outputs)

    options = {"noise": noise, "perturbation": perturbation, "member_bias": True}
    check(Unrolled(kind(3, 2, bias=bias)), torch.randn(B, 3, 3), reference, 3, **options)
