"""What computing members costs, and which way costs least: constants of a machine, and nothing else, decide.

The constants in `cost.json` are rounded from times of single operations and of whole networks on two CPU cores;
`benchmarks/speed/calibrate.py` fits them to another machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("cost.json")
CLOSE = 1.01
"""Times this close are the same as far as can be foretold: then fewer members at once need less memory."""
_REMEMBERED = 1024
"""Number of sizes of inputs for which a choice is kept: those of a decoder grow with each token."""


@dataclass(frozen=True)
class Work:
    """What one layer does in one forward pass.

    Attributes:
        calls: of the layer.
        weight: elements of its weights.
        inputs, outputs: elements for one example, over all calls.
        products: multiplications of its linear maps for one example.
        factors: whether it has any.
    """

    calls: int
    weight: int
    inputs: float
    outputs: float
    products: float
    factors: bool = True


@dataclass(frozen=True)
class Costs:
    """Seconds on one machine.

    Attributes:
        call: of calling a layer, and what lies between it and the next.
        product: of one multiplication in a linear map.
        weight: of reading one element of a weight, and laying it out.
        multiply: of multiplying one element of activations by a factor.
        fold: of multiplying one element of a weight by its factors.
        fresh: of one element of memory that is had from the system, as tensors from `kept_bytes` on are.
        kept_bytes: size from which on the memory of a tensor is not used again.
    """

    call: float
    product: float
    weight: float
    multiply: float
    fold: float
    fresh: float
    kept_bytes: int = 32 << 20

    def folds(self, weight: float, activations: float) -> bool:
        """Whether multiplying a weight costs less than multiplying what the layer gets and gives (elements)."""
        return self.fold * weight < self.multiply * activations

    def of_layer(self, work: Work, rows: float, single: bool) -> float:
        """Seconds of a layer for as many rows.

        Args:
            single: whether all rows share one draw, which may then be folded into the weight.
        """
        seconds = self.call * work.calls + self.product * work.products * rows + self.weight * work.weight
        seconds += self.of_memory(work.outputs * rows, work.calls)
        if self.folded(work, rows, single):
            seconds += self.fold * work.weight
        elif work.factors:
            seconds += self.multiply * (work.inputs + work.outputs) * rows
        return seconds

    def of_memory(self, elements: float, tensors: int = 1) -> float:
        """Seconds of getting memory for tensors of one size, with so many elements together."""
        return self.fresh * elements if 4 * elements / max(tensors, 1) >= self.kept_bytes else 0.0

    def folded(self, work: Work, rows: float, single: bool) -> bool:
        """Whether a layer's factors go into its weight."""
        return work.factors and single and self.folds(work.weight, (work.inputs + work.outputs) * rows)


@cache
def costs() -> Costs:
    """Of the machine that the library was calibrated on."""
    return Costs(**json.loads(FILE.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Workload:
    """What a network does with inputs of one kind.

    Attributes:
        sites: the work of layers that members do not share.
        shared: of layers that all members share.
        outputs: elements that the network gives for one example.
    """

    sites: Mapping[str, Work]
    shared: Mapping[str, Work]
    outputs: float = 0.0
    _at_once: dict[tuple[int, float, bool], int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def seconds(self, members: int, at_once: int, examples: float, single: bool, machine: Costs | None = None) -> float:
        """Of K members, so many of them at once.

        Args:
            examples: B, the number of examples, in units of what the work was measured on.
            single: whether the rows of one member share a draw.
        """
        c, alone = machine or costs(), single and at_once == 1
        own = sum(c.of_layer(work, at_once * examples, alone) for work in self.sites.values())
        shared = sum(c.of_layer(work, examples, False) for work in self.shared.values())
        joined = 0.0 if at_once == members else c.of_memory(self.outputs * members * examples)
        return members / at_once * (own + shared) + joined

    def plain_seconds(self, examples: float) -> float:
        """Of one forward pass of the network without factors."""
        layers = (replace(work, factors=False) for work in (*self.sites.values(), *self.shared.values()))
        return sum(costs().of_layer(work, examples, False) for work in layers)

    def members_at_once(self, members: int, examples: float, single: bool) -> int:
        """How many members to compute at once."""
        sizes = (members, examples, single)
        least = self._at_once.get(sizes)
        if least is None:
            seconds = {count: self.seconds(members, count, examples, single) for count in divisors(members)}
            most = CLOSE * min(seconds.values())
            least = min(count for count in seconds if seconds[count] <= most)
            if len(self._at_once) >= _REMEMBERED:
                self._at_once.clear()
            self._at_once[sizes] = least
        return least


def divisors(members: int) -> list[int]:
    """Numbers of members that can be computed at once, the largest first."""
    return [count for count in range(members, 0, -1) if members % count == 0]
