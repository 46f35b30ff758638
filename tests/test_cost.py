"""What is foretold of costs is what decides."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from bayesify import Rank1Config, bayesify, cost
from bayesify.cost import Costs, Work, Workload, divisors
from bayesify.cost_report import cost_report, first_site_report
from bayesify.errors import ConversionError


def test_a_layer_without_factors_costs_no_multiplications() -> None:
    costs = Costs(call=1.0, product=0.5, weight=0.25, multiply=0.125, fold=0.0625, fresh=100.0)
    work = Work(calls=2, weight=8, inputs=4.0, outputs=16.0, products=10.0)
    plain = Work(2, 8, 4.0, 16.0, 10.0, factors=False)
    assert costs.of_layer(plain, 3, single=False) == 2 * 1.0 + 3 * 10 * 0.5 + 8 * 0.25
    assert costs.of_layer(work, 3, single=False) == 19.0 + 3 * 20 * 0.125
    assert costs.of_layer(work, 3, single=True) == 19.0 + 8 * 0.0625  # folded, which costs less


def test_large_outputs_cost_memory_and_are_joined_if_they_come_in_parts() -> None:
    costs = Costs(call=0.0, product=0.0, weight=0.0, multiply=0.0, fold=0.0, fresh=1.0, kept_bytes=400)
    work = Work(calls=2, weight=0, inputs=0.0, outputs=100.0, products=0.0)
    assert [costs.of_layer(work, rows, single=False) for rows in (1, 2, 3)] == [0.0, 200.0, 300.0]
    load = Workload({"head": work}, {}, outputs=50.0)
    assert [load.seconds(4, count, 1.0, False, costs) for count in (4, 2, 1)] == [400.0, 600.0, 200.0]
    assert [load.seconds(4, count, 0.4, False, costs) for count in (4, 2, 1)] == [0.0, 0.0, 0.0]


def test_the_least_of_the_totals_is_taken() -> None:
    torch.manual_seed(0)
    bnn = bayesify(timm.create_model("resnet18"), members=4, sites="last-stage").eval()
    inputs = ((torch.randn(2, 3, 64, 64),), {})
    report = cost_report(bnn, inputs)
    assert list(report.totals) == divisors(4) == [4, 2, 1]
    least = min(report.totals.values())
    assert report.at_once == min(count for count, total in report.totals.items() if total <= cost.CLOSE * least)
    assert report.parted == "layer4.0.conv1"
    strategy = bnn.passes.strategies.of(*inputs)
    assert report.at_once == strategy.members_at_once(4, *inputs, single=True)
    passes = 4 / report.at_once
    assert passes * sum(layer.milliseconds for layer in report.layers) == pytest.approx(report.totals[report.at_once])
    ways = {layer.name: layer.way for layer in report.layers}
    assert ways["layer3.0.conv1"] == "none: once for all members"
    assert "none" not in ways["layer4.0.conv1"]


def test_later_first_sites_cost_less() -> None:
    model = timm.create_model("resnet18").eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = first_site_report(model, Rank1Config(members=4), ((torch.randn(2, 3, 64, 64),), {}))
    assert [row.sites for row in report.rows] == ["all", "layer1", "layer2", "layer3", "layer4", "head"]
    for field in ("milliseconds", "parameters"):
        values = [getattr(row, field) for row in report.rows]
        assert values == sorted(values, reverse=True)
    assert model.state_dict().keys() == state.keys()


def test_a_lookup_multiplies_nothing() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(1000, 8), nn.Linear(8, 2)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(ids).mean(1))

    bnn = bayesify(Tokens(), members=2).eval()
    ids = torch.randint(1000, (3, 5))
    bnn(ids)
    load = bnn.passes.strategies.of((ids,), {}).workload
    assert isinstance(load, Workload)
    works = {**load.sites, **load.shared}
    assert works["embedding"].products == 0
    assert works["head"].products == 16


def test_costs_of_code_that_depends_on_values_are_not_foretold() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x) if float(x.sum()) > 0 else -self.head(x)

    bnn = bayesify(Gate(), members=2).eval()
    with pytest.raises(ConversionError, match="cannot be run on shapes alone"):
        cost_report(bnn, ((torch.randn(2, 4),), {}))
