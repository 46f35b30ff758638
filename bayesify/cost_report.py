"""What members are expected to cost, and why they are computed as they are: the decisions of `bayesify.cost`, shown."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import nn

from bayesify.config import Rank1Config
from bayesify.convert import bayesify
from bayesify.cost import Workload, costs, divisors
from bayesify.errors import ConversionError
from bayesify.graph import stages
from bayesify.graph.inputs import Inputs, sizes_of
from bayesify.model import BayesianModel
from bayesify.strategy import Strategy


@dataclass(frozen=True)
class LayerCost:
    """Of one layer in one pass: milliseconds, and what is done about its factors."""

    name: str
    milliseconds: float
    way: str


@dataclass(frozen=True)
class CostReport:
    """Milliseconds that the constants of `bayesify/cost.json` foretell for a prediction at the posterior means.

    Attributes:
        inputs: what it is for.
        members: K.
        plain: of K passes of the plain network.
        totals: {members at once: of all members}.
        at_once: the number of members at once that is taken: with the least of them, or close to it.
        parted: the module at whose inputs members part; `None` where they do from the beginning.
        layers: of one pass with so many members.
    """

    inputs: str
    members: int
    plain: float
    totals: dict[int, float]
    at_once: int
    parted: str | None
    layers: list[LayerCost]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        where = "from the inputs on" if self.parted is None else f"from the inputs of {self.parted} on"
        yield f"For {self.inputs}. Members differ {where}."
        total = Table("members at once", "ms, all members", f"over {self.members} plain passes", "")
        for count, value in self.totals.items():
            total.add_row(
                str(count), f"{value:.1f}", f"{value / self.plain:.2f}", "taken" if count == self.at_once else ""
            )
        yield total
        table = Table("layer", "ms", "factors", title=f"One pass with {self.at_once} of {self.members} members")
        for layer in self.layers:
            table.add_row(layer.name, f"{layer.milliseconds:.2f}", layer.way)
        yield table


@dataclass(frozen=True)
class FirstSite:
    """What it costs to begin with factors at one place."""

    sites: str
    parted: str | None
    parameters: int
    milliseconds: float
    ratio: float


@dataclass(frozen=True)
class FirstSiteReport:
    """One row for each value of `sites`, over K passes of the plain network."""

    inputs: str
    members: int
    rows: list[FirstSite]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(
            "sites", "members part at", "parameters added", "ms", f"over {self.members} plain passes",
            title=f"Where factors begin, for {self.inputs}",
        )  # fmt: skip
        for row in self.rows:
            parted = row.parted or "the inputs"
            table.add_row(row.sites, parted, f"{row.parameters:,}", f"{row.milliseconds:.1f}", f"{row.ratio:.2f}")
        yield table


def cost_report(bnn: BayesianModel, inputs: Inputs) -> CostReport:
    """What predictions for such inputs are expected to cost.

    Raises:
        ConversionError: the network cannot be run on shapes alone, so nothing is foretold and all members are computed
            at once.
    """
    strategy, load = _look(bnn, inputs)
    examples, k = strategy.examples(*inputs), bnn.members
    at_once = strategy.members_at_once(k, *inputs, single=True)
    layers = [
        LayerCost(name, 1e3 * costs().of_layer(work, examples, False), "none: once for all members")
        for name, work in load.shared.items()
    ]
    for name, work in load.sites.items():
        rows, single = at_once * examples, at_once == 1
        seconds = costs().of_layer(work, rows, single)
        way = "multiplied with activations" if work.factors else "none"
        if costs().folded(work, rows, single):
            way = "folded into the weight"
        layers.append(LayerCost(name, 1e3 * seconds, way))
    return CostReport(
        sizes_of(inputs),
        k,
        1e3 * k * load.plain_seconds(examples),
        {count: 1e3 * load.seconds(k, count, examples, True) for count in divisors(k)},
        at_once,
        None if strategy.cut is None else strategy.cut.at,
        layers,
    )


def first_site_report(model: nn.Module, config: Rank1Config, inputs: Inputs) -> FirstSiteReport:
    """What it would cost to begin with factors at each stage of a network, which is as it was afterwards.

    Raises:
        ConversionError: as for `cost_report`; or there is no layer to convert at all.
    """
    rows = []
    for sites in ("all", *stages(model), "head"):
        try:
            bnn = bayesify(model, replace(config, sites=sites))
        except ConversionError:
            continue  # from there on nothing can have factors
        try:
            report = cost_report(bnn, inputs)
            added = sum(parameter.numel() for _, _, factor in bnn.factors() for parameter in factor.parameters())
        finally:
            bnn.unload()
        milliseconds = report.totals[report.at_once]
        rows.append(FirstSite(sites, report.parted, added, milliseconds, milliseconds / report.plain))
    if not rows:
        raise ConversionError(f"found no layer to convert in {type(model).__name__}, whatever the first site.")
    return FirstSiteReport(sizes_of(inputs), config.members, rows)


def _look(bnn: BayesianModel, inputs: Inputs) -> tuple[Strategy, Workload]:
    strategy = bnn.passes.strategies.of(*inputs)
    if strategy.workload is None:
        raise ConversionError(
            f"{type(bnn.model).__name__} cannot be run on shapes alone, so its cost is not known beforehand; all "
            "members are computed at once. Time `predict` with member_chunk=1 beside it."
        )
    return strategy, strategy.workload
