"""Capture, the plan, and the audit on small modules, one peculiarity each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import CASES
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify import ConversionError, Rank1Config, Rank1Layer, bayesify, rank1
from bayesify.errors import RowsError
from bayesify.graph import find_sites
from bayesify.graph.capture import capture, linear_uses
from bayesify.graph.inputs import derive_inputs
from bayesify.graph.sites import Plan
from bayesify.layers import registry


def plan_of(model: nn.Module, inputs: Any = None) -> Plan:
    return find_sites(model, Rank1Config(members=2), None if inputs is None else ((inputs,), {}))


class Raw(nn.Module):
    """A matrix of its own, multiplied in a way given by the test, beside an ordinary layer."""

    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], untraceable: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.shift = nn.Parameter(torch.randn(1, 4))
        self.multiply = multiply
        self.untraceable = untraceable

    def forward(self, x: Tensor) -> Tensor:
        if self.untraceable and x.shape[0] > 1000:
            raise ValueError("too many examples")
        return self.multiply(self.layer(x), self.matrix) + self.shift


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: torch.matmul(x, w),
    "operator": lambda x, w: x @ w,
    "method": lambda x, w: x.mm(w),
    "einsum": lambda x, w: torch.einsum("bi,ij->bj", x, w),
    "transposed": lambda x, w: x @ w.t(),
    "scaled": lambda x, w: x @ (w * 2.0).softmax(-1),
    "addmm": lambda x, w: torch.addmm(x, x, w),
}


# ------------------------------------------------------------------------------------------------ capture


def test_capture_keeps_children_as_leaves() -> None:
    graph = capture(Raw(PRODUCTS["matmul"]))
    assert graph is not None
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["layer"]
    assert [node.target for node in graph.nodes if node.op == "get_attr"] == ["matrix", "shift"]


def test_capture_of_data_dependent_code_is_none() -> None:
    assert capture(Raw(PRODUCTS["matmul"], untraceable=True)) is None


class Counting(nn.Module):
    """Code that changes its module, as batch norms that count batches do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        self.last = torch.ones(1)
        return self.layer(x) + torch.tensor([1.0])


def test_planning_runs_forward_but_changes_nothing() -> None:
    model = Counting()
    before = set(vars(model))
    assert list(plan_of(model).layers) == ["layer"]
    assert float(model.calls) == 0.0
    assert set(vars(model)) == before


def test_linear_uses_follow_parameters_through_views_but_not_sums() -> None:
    model = Raw(PRODUCTS["scaled"])
    graph = capture(model)
    assert graph is not None
    uses, constant = linear_uses(
        graph.nodes,
        lambda node: str(node.target) if node.op == "get_attr" else None,
        lambda node: node.op == "placeholder",
    )
    assert [(use.parameters, use.operation, use.carries_batch) for use in uses] == [
        (frozenset({"matrix"}), "matmul", True)
    ]
    assert constant == []


# ------------------------------------------------------------------------------------------------ raw parameters


@pytest.mark.parametrize("untraceable", [False, True], ids=["fx", "export"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_raw_matrix_is_a_site_or_listed(name: str, untraceable: bool) -> None:
    plan = plan_of(Raw(PRODUCTS[name], untraceable), torch.randn(3, 4) if untraceable else None)
    assert plan.routes[""] == ("export" if untraceable else "fx")
    assert plan.notes == []
    if name == "scaled":
        assert list(plan.layers) == ["layer"]
        assert plan.skipped["matrix"].startswith("raw parameter, used through ")
        assert "changed by mul" in plan.skipped["matrix"]
    else:
        assert plan.sites() == {"layer": ("Linear", (4, 4)), "matrix": ("Raw", (4, 4))}
        assert not plan.skipped
        assert plan.functional == {"": {"matrix": "fc" if name in ("linear", "transposed") else "cf"}}


def test_raw_matrix_without_inputs_to_export_is_listed_and_noted() -> None:
    plan = plan_of(Raw(PRODUCTS["matmul"], untraceable=True))
    assert list(plan.layers) == ["layer"]
    assert "use unknown" in plan.skipped["matrix"]
    assert plan.routes[""] == "swap"
    assert "example_inputs" in plan.notes[0]


class Experts(nn.Module):
    """Fused weights of several experts, as in mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 8))
        self.layer = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.bmm(x.expand(3, -1, -1), self.up).mean(0))


def test_fused_weights_are_one_site() -> None:
    plan = plan_of(Experts())
    assert not plan.skipped
    assert plan.sites() == {"layer": ("Linear", (8, 2)), "up": ("Experts", (12, 24))}


# ------------------------------------------------------------------------------------------------ behind a layer's back


class BehindTheBack(nn.Module):
    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.untraceable = untraceable

    def forward(self, x: Tensor) -> Tensor:
        if self.untraceable and x.shape[0] > 1000:
            raise ValueError("too many examples")
        return self.head((self.proj.weight @ x.t()).t())


@pytest.mark.parametrize("untraceable", [False, True], ids=["fx", "export"])
def test_weight_used_without_its_layer_is_a_site_of_its_user(untraceable: bool) -> None:
    model = BehindTheBack(untraceable)
    plan = plan_of(model, torch.randn(3, 4) if untraceable else None)
    assert plan.sites() == {"head": ("Linear", (4, 2)), "proj": ("BehindTheBack", (4, 4))}
    assert not plan.skipped
    bnn = bayesify(model, members=2, **({"example_inputs": torch.randn(3, 4)} if untraceable else {}))
    assert type(bnn.model.proj) is nn.Linear
    assert {name for name, _, _ in bnn.factors()} == {"head", "proj"}


class TiedDecoder(nn.Module):
    """Reads a child's weight twice: by calling it and as a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.encoder(x).relu(), self.encoder.weight.t()))


def test_weight_used_both_ways_is_skipped() -> None:
    plan = plan_of(TiedDecoder())
    assert list(plan.layers) == ["head"]
    assert "by the layer encoder" in plan.skipped["encoder"]


# ------------------------------------------------------------------------------------------------ constants


class FedByAConstant(nn.Module):
    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(5, 4))
        self.positions = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.layer = nn.Linear(4, 2)
        self.untraceable = untraceable

    def forward(self, x: Tensor) -> Tensor:
        if self.untraceable and x.shape[0] > 1000:
            raise ValueError("too many examples")
        return self.layer(x + self.positions(self.table))


@pytest.mark.parametrize("untraceable", [False, True], ids=["fx", "export"])
def test_layer_fed_by_a_constant_is_skipped(untraceable: bool) -> None:
    plan = plan_of(FedByAConstant(untraceable), torch.randn(3, 5, 4) if untraceable else None)
    assert list(plan.layers) == ["layer"]
    for name in ("positions.0", "positions.2"):
        assert "does not carry the batch" in plan.skipped[name]


class PositionGrid(nn.Module):
    """Called with numbers: its layer sees positions, which are repeated for the batch afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv1d(1, 4, 1)

    def forward(self, batch: int, size: int) -> Tensor:
        return self.projection(torch.arange(size, dtype=torch.float32)[None, None]).repeat(batch, 1, 1)


class FedByAGrid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positions, self.layer = PositionGrid(), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.positions(x.shape[0], x.shape[2]))


def test_layer_fed_by_positions_is_skipped() -> None:
    bnn = bayesify(FedByAGrid(), members=2, example_inputs=torch.randn(3, 4, 5))
    assert set(bnn.report.converted) == {"layer"}
    assert "does not carry the batch" in bnn.report.skipped["positions.projection"]
    assert bnn.predict(torch.randn(3, 4, 5)).outputs.shape == (2, 1, 3, 4, 5)
    assert set(bayesify(FedByAGrid(), members=2).report.converted) == {"layer"}


class UntracedTable(FedByAConstant):
    """The container that reads a constant holds a layer that sees the batch, too."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1000:
            raise ValueError("too many examples")
        return self.layer(x) + F.linear(self.table, self.positions[0].weight).sum()


def test_constants_of_a_container_say_nothing_of_its_layers() -> None:
    plan = plan_of(UntracedTable(untraceable=True), torch.randn(3, 5, 4))
    assert "layer" in plan.layers


# ------------------------------------------------------------------------------------------------ attention of torch.nn


def test_layers_of_torch_transformers_are_sites() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3))
    bnn = bayesify(model, members=2, example_inputs=torch.randn(2, 5, 8))
    attention = {"0.self_attn.in_proj_weight", "0.self_attn.out_proj"}
    assert set(bnn.report.converted) == attention | {"0.linear1", "0.linear2", "1"}
    assert not bnn.report.skipped


# ------------------------------------------------------------------------------------------------ audit


class TimeFirst(nn.Module):
    """Calls its layers on [T, B, d], so that rows of the first dimension are time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.transpose(0, 1)).transpose(0, 1).mean(1))


@pytest.mark.parametrize("inputs_at_conversion", [True, False])
@pytest.mark.parametrize("steps", [6, 8], ids=["multiple-of-no-batch", "multiple-of-the-batch"])
def test_layer_that_sees_time_first(steps: int, inputs_at_conversion: bool) -> None:
    model = TimeFirst()
    x = torch.randn(4, steps, 4)
    given: dict[str, Any] = {"example_inputs": x} if inputs_at_conversion else {}
    bnn = bayesify(copy.deepcopy(model), members=2, init="normal", posterior="deterministic", **given)
    found = bnn.predict(x).outputs[:, 0]
    assert bnn.report.batch_dims == {"inner": 1}
    assert not bnn.report.unsettled
    for member in range(2):
        torch.testing.assert_close(found[member], bnn.merge(member)(x))
    assert (found[0] - found[1]).abs().max() > 1e-3


class PackedRows(nn.Module):
    """Calls a layer on all tokens of a batch as one row [1, N, d]; which tokens there are depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        packed = self.inner(x[mask][None]).tanh()[0]
        return self.head(torch.stack([part.mean(0) for part in packed.split(mask.sum(1).tolist())]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inputs_at_conversion", [True, False])
def test_layer_that_sees_all_tokens_in_one_row(inputs_at_conversion: bool, training: bool) -> None:
    model = PackedRows()
    inputs = {"x": torch.randn(4, 6, 4), "mask": torch.tensor([[True] * 5 + [False]] * 4)}
    given: dict[str, Any] = {"example_inputs": inputs} if inputs_at_conversion else {}
    bnn = bayesify(copy.deepcopy(model), members=2, init="normal", posterior="deterministic", **given)
    assert bnn.report.batch_dims == ({"inner": 1} if inputs_at_conversion else {})
    members = torch.stack([bnn.merge(member)(**inputs) for member in range(2)])
    if training:
        torch.testing.assert_close(bnn.train()(**inputs).unflatten(0, (2, 4)), members)
    else:
        torch.testing.assert_close(bnn.predict(**inputs).outputs[:, 0], members)
    assert bnn.report.batch_dims == {"inner": 1}
    assert (members[0] - members[1]).abs().max() > 1e-3
    torch.testing.assert_close(bnn.predict(**inputs).outputs[:, 0], members)


class PerImage(nn.Module):
    """Calls one layer on positions, which are the same for all, and one on each example by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.each, self.head = nn.Linear(1, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        steps = [float(step) for step in range(int(x.shape[1]))]
        x = x + self.positions(torch.tensor(steps)[None, :, None])
        x = torch.cat([self.each(row[None].mT) for row in list(x)]).mT
        return self.head(x).mean(1)


def test_layers_whose_input_does_not_carry_the_batch_lose_their_factors() -> None:
    bnn = bayesify(PerImage(), members=2, init="normal", posterior="deterministic")
    sites = set(bnn.report.converted)
    assert sites == {"positions", "each", "head"}
    x = torch.randn(3, 6, 4)
    found = bnn.predict(x).outputs[:, 0]
    assert set(bnn.report.converted) == {"head"}
    assert "same for every example" in bnn.report.skipped["positions"]
    assert "called anew for every example" in bnn.report.skipped["each"]
    assert bnn.report.parameters_added == sum(p.numel() for _, _, f in bnn.factors() for p in f.parameters())
    for member in range(2):
        torch.testing.assert_close(found[member], bnn.merge(member)(x))
    given = bayesify(PerImage(), members=2, example_inputs=x)
    assert set(given.report.converted) == {"head"}


def test_layer_that_sees_the_batch_in_two_places_loses_its_factors() -> None:
    """As many stacked layers as members: nothing would tell that their rows are no members."""

    class Stacked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.box, self.once = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.once(torch.stack([self.box(x), x])).mean(0) + self.box(torch.stack([x, -x])).sum(0)

    model, x = Stacked(), torch.randn(2, 3, 4)
    bnn = bayesify(copy.deepcopy(model), members=2, init="normal", posterior="deterministic")
    found = bnn.predict(x).outputs[:, 0]
    assert "in another at the next" in bnn.report.skipped["box"]
    assert bnn.report.batch_dims == {"once": 1}
    for member in range(2):
        torch.testing.assert_close(found[member], bnn.merge(member)(x))


def test_rows_that_fit_nothing_are_an_error() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x[: len(x) // 2 + 1].mean(1))

    bnn = bayesify(Halved(), members=2)
    with pytest.raises(RowsError, match="no multiple"):
        bnn.predict(torch.randn(4, 6, 4))
    assert set(bnn.report.converted) == {"inner"}


class MixesRows(nn.Module):
    """Every example sees the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y - y.mean(0)


def test_network_that_mixes_examples_is_caught() -> None:
    with pytest.raises(ConversionError, match="depends on another row's factors"):
        bayesify(MixesRows(), members=2, example_inputs=torch.randn(3, 4))


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 2)
        self.spare = nn.Linear(4, 2)
        self.dead = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0.0 * self.dead(x)


def test_layer_that_is_not_called_is_skipped() -> None:
    assert set(bayesify(HalfUsed(), members=2).report.converted) == {"used", "spare", "dead"}
    report = bayesify(HalfUsed(), members=2, example_inputs=torch.randn(2, 4)).report
    assert set(report.converted) == {"used", "dead"}
    assert report.skipped == {"spare": "not called on the example inputs"}
    assert any("dead" in note and "do not move" in note for note in report.notes)


def test_only_unused_layers_left_is_an_error() -> None:
    with pytest.raises(ConversionError, match="Not called: spare"):
        bayesify(HalfUsed(), members=2, include="spare", example_inputs=torch.randn(2, 4))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "time-first"])
def test_bare_recurrent_layer_passes_the_audit(batch_first: bool, packed: bool) -> None:
    # Twice as many layers as examples: the first dimension of the states then looks like a batch of two members.
    x: Any = torch.randn(2, 5, 4) if batch_first else torch.randn(5, 2, 4)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 5]), batch_first, enforce_sorted=False)
    report = bayesify(nn.GRU(4, 3, num_layers=4, batch_first=batch_first), members=2, example_inputs=(x,)).report
    assert len(report.converted) == 8
    assert report.skipped == {}
    assert report.notes == []


# ------------------------------------------------------------------------------------------------ names


class Tied(nn.Module):
    def __init__(self, untraceable: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.inner = nn.Linear(4, 4, bias=False)
        self.again = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.again.weight = self.inner.weight
        self.head.weight = self.embedding.weight
        self.untraceable = untraceable

    def forward(self, ids: Tensor) -> Tensor:
        if self.untraceable and ids.shape[0] > 1000:
            raise ValueError("too many examples")
        return self.head(self.again(self.inner(self.embedding(ids)).relu()))


@pytest.mark.parametrize("untraceable", [False, True], ids=["fx", "export"])
def test_tied_weights_are_recorded_and_their_layers_converted(untraceable: bool) -> None:
    model = Tied(untraceable)
    report = bayesify(model, members=2, example_inputs=torch.randint(7, (3, 5))).report
    assert set(report.converted) == {"inner", "again", "head"}
    assert report.tied == {
        "inner": ["again.weight"], "again": ["inner.weight"], "head": ["embedding.weight"],
    }  # fmt: skip
    assert set(report.skipped) == {"embedding"}
    locs = {name: factor for name, side, factor in bayesify_factors(model) if side == "s"}
    assert locs["inner"] is not locs["again"], "factors belong to the site, not to the weight"
    assert model.again.weight is model.inner.weight


def bayesify_factors(model: nn.Module) -> list[tuple[str, str, Any]]:
    return [
        (name, side, getattr(layer.site, side))
        for name, layer in model.named_modules()
        if isinstance(layer, Rank1Layer)
        for side in ("s", "r")
    ]


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama"])
def test_language_models_with_example_inputs_account_for_the_same(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    _, inputs = case.example()
    planned = bayesify(case.model(), members=2).report
    checked = bayesify(case.model(), members=2, example_inputs=inputs).report
    assert checked.converted == planned.converted
    assert checked.skipped == planned.skipped


class SharedModule(nn.Module):
    """One module registered under two names and called under both."""

    def __init__(self, untraceable: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.untraceable = untraceable

    def forward(self, x: Tensor) -> Tensor:
        if self.untraceable and x.shape[0] > 1000:
            raise ValueError("too many examples")
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("untraceable", [False, True], ids=["fx", "export"])
def test_shared_module_is_one_site(untraceable: bool) -> None:
    model = SharedModule(untraceable)
    weight, bias = model.first.weight.detach().clone(), model.first.bias.detach()
    bnn = bayesify(model, members=2, init_scale=0.3, example_inputs=torch.randn(3, 4))
    assert set(bnn.report.converted) == {"first"}
    assert bnn.model.second is bnn.model.first
    s, r = (factor.loc for _, _, factor in bnn.factors())
    x = torch.randn(3, 4)
    for k, found in enumerate(bnn.predict(x).outputs[:, 0]):
        scaled = weight * torch.outer(r[k], s[k])
        torch.testing.assert_close(found, F.linear(F.linear(x, scaled, bias).relu(), scaled, bias))
    bnn.unload()
    assert type(model.first) is nn.Linear


def test_layers_inside_a_registered_layer_are_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))

    class LowRank(nn.Module):
        """W = U V, two layers that make one linear map."""

        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(4, 2, bias=False)
            self.up = nn.Linear(2, 4, bias=False)
            self.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    @rank1(LowRank)
    class Rank1LowRank(Rank1Layer, LowRank):
        @classmethod
        def sizes(cls, layer: LowRank) -> dict[str, tuple[int, int]]:
            return {"weight": (layer.down.in_features, layer.up.out_features)}

    model = nn.Sequential(nn.Linear(4, 4), LowRank())
    bnn = bayesify(model, members=2, example_inputs=torch.randn(3, 4))
    assert bnn.report.converted == {"0": "Linear", "1": "LowRank"}
    assert set(bnn.report.skipped) == {"1.down", "1.up"}
    assert all("part of the layer 1" in reason for reason in bnn.report.skipped.values())
    registry.rank1_class.cache_clear()


def test_lazy_layers_are_refused_until_they_have_a_shape() -> None:
    with pytest.raises(ConversionError, match="run one forward pass first"):
        bayesify(nn.Sequential(nn.LazyLinear(3)), members=2)


# ------------------------------------------------------------------------------------------------ derived inputs


@pytest.mark.parametrize("name", ["resnet18", "bert", "gpt2", "t5", "vit_hf", "wav2vec2"])
@torch.no_grad()
def test_inputs_derived_from_a_models_description_fit_it(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.model()
    inputs = derive_inputs(model)
    assert inputs is not None
    args, kwargs = inputs
    found = model(*args, **kwargs)
    logits = found.logits if hasattr(found, "logits") else found
    assert logits.shape[0] == 2
    assert torch.isfinite(logits).all()


def test_no_inputs_are_derived_for_other_models() -> None:
    assert derive_inputs(nn.Linear(3, 2)) is None


def test_bilinear_is_a_site() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 4)
            self.pair = nn.Bilinear(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.pair(y, y)

    bnn = bayesify(Pair(), members=2, init="normal", posterior="deterministic")
    assert list(bnn.report.converted) == ["body", "pair"]
    x = torch.randn(4, 3)
    found = bnn.predict(x).outputs[:, 0]
    for member in range(2):
        torch.testing.assert_close(found[member], bnn.merge(member)(x))
