"""Which parameters are in linear maps, and what became of them: converted, left out for a reason, or forgotten."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from bayesify import ConversionReport
from benchmarks.coverage.jobs import Row

_NO_LINEAR_MAP = ("an embedding looks rows up", "part of the layer", "its input does not carry the batch")
_UNKNOWN = "use unknown"


@dataclass
class _Skipped:
    """What was left out for one reason under one name, e.g. every `relative_position_bias_table` of a Swin."""

    reason: str
    owner: str
    name: str
    count: int = 0
    parameters: int = 0
    example: str = ""


class Account:
    """Who owns which parameter, noted before the conversion."""

    def __init__(self, model: nn.Module) -> None:
        self.sizes: dict[str, int] = {}
        self.first_name: dict[str, str] = {}
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.first_name[name] = names.setdefault(id(parameter), name)
            if parameter.dim() > 1:
                self.sizes[name] = parameter.numel()
        self.classes = {name: type(module).__name__ for name, module in model.named_modules()}

    def of(self, report: ConversionReport, linear: set[str] | None = None) -> Row:
        """The part of a row that a report gives; `linear` names what was seen to enter a linear map."""
        converted = {name for site in report.converted for name in self._below(self._layer(site))}
        skipped = dict(report.skipped)
        covered = {name for entry in skipped for name in self._below(entry)}
        seen = self._linear_by_reason(skipped) if linear is None else linear
        unknown = {n for entry, r in skipped.items() if r.endswith(_UNKNOWN) for n in self._below(entry)}
        accounted = self._unique(converted | covered)
        routes = list(report.routes.values())
        return {
            "sites": len(report.converted),
            **self.share(seen | converted, converted),
            "unknown_parameters": sum(self.sizes[name] for name in self._unique(unknown)),
            "silent": sorted(self._unique(seen) - accounted) if linear is not None else [],
            "skipped": [vars(group) for group in self._groups(skipped)],
            "routes": {route: routes.count(route) for route in ("fx", "export", "swap") if route in routes},
            "notes": [note for note in report.notes if "do not move" not in note],
        }

    def share(self, linear: set[str], converted: set[str]) -> Row:
        """How many parameters are in linear maps, and how many of these are random."""
        linear = self._unique(linear)
        total = sum(self.sizes[name] for name in linear)
        done = sum(self.sizes[name] for name in linear & self._unique(converted))
        return {"linear_parameters": total, "converted_parameters": done, "share": done / total if total else None}

    def _below(self, entry: str) -> set[str]:
        return {name for name in self.sizes if name == entry or not entry or name.startswith(f"{entry}.")}

    def _layer(self, site: str) -> str:
        """A site is a layer, or a weight of one; the model itself has the empty name."""
        return site if site in self.classes or site in self.sizes else ""

    def _unique(self, names: set[str]) -> set[str]:
        return {self.first_name[name] for name in names if name in self.first_name} & self.sizes.keys()

    def _linear_by_reason(self, skipped: dict[str, str]) -> set[str]:
        linear = [entry for entry, r in skipped.items() if not (r.startswith(_NO_LINEAR_MAP) or r.endswith(_UNKNOWN))]
        return {name for entry in linear for name in self._below(entry)}

    def _groups(self, skipped: dict[str, str]) -> list[_Skipped]:
        groups: dict[tuple[str, str, str], _Skipped] = {}
        for entry, text in skipped.items():
            reason, user = _reason_of(text)
            parent, _, leaf = entry.rpartition(".")
            owner = self.classes.get(user if user is not None else parent, "")
            group = groups.setdefault((reason, owner, leaf), _Skipped(reason, owner, leaf, example=entry))
            group.count += 1
            group.parameters += sum(self.sizes[name] for name in self._unique(self._below(entry)))
        return list(groups.values())


def _reason_of(text: str) -> tuple[str, str | None]:
    """A reason without the names in it, and the module that it says uses the weight."""
    uses = r"used through \S+ in|may be read in|given to|returned by"
    match = re.fullmatch(rf"((?:raw parameter, )?(?:{uses})) (.*?)(, .*)", text)
    if match:
        return f"{match[1]}{match[3]}", "" if match[2] == "the model" else match[2]
    if text.startswith("part of the layer "):
        return "a part of a converted layer", None
    if text.startswith("its own forward failed"):
        return "its own forward failed on a random input", None
    return text, None
