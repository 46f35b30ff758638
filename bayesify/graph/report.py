"""What a conversion did, or would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text


@dataclass
class ConversionReport:
    """The account of every weight that enters a linear map.

    Attributes:
        converted: {site name: kind of layer}; a recurrent layer has one site for each kernel.
        skipped: {layer or parameter name: reason}.
        sizes: {site name: (input channels, output channels)}.
        tied: {site name: other names of the same parameter}; factors belong to the site, the weight stays shared.
        routes: {module name: "fx" | "export" | "swap"}, how each forward was planned.
        batch_dims: {site: dimension of its input that carries the batch}, where it is not the first.
        unsettled: whether this is still to be looked at, with the inputs of the first call.
        notes: what a person should know besides.
        members: K.
        parameters: number of parameters of the original network.
        parameters_added: number of parameters that the conversion adds: factors, and what members have of their own.
        factors: which sides of a site carry factors: "both", "inputs" or "outputs".
    """

    members: int
    parameters: int
    parameters_added: int
    converted: dict[str, str]
    skipped: dict[str, str]
    factors: str = "both"
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(default_factory=dict)
    routes: dict[str, str] = field(default_factory=dict)
    batch_dims: dict[str, int] = field(default_factory=dict)
    unsettled: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def parameter_overhead(self) -> float:
        """Added parameters as a fraction of the original ones, e.g. 0.0163."""
        return self.parameters_added / max(self.parameters, 1)

    def leave_out(self, site: str, reason: str, parameters: int) -> None:
        """Note that a site was taken out again, and how many parameters with it."""
        for kept in (self.converted, self.sizes, self.tied, self.batch_dims):
            kept.pop(site, None)
        self.skipped[site] = reason
        self.parameters_added -= parameters

    def to_dict(self) -> dict[str, Any]:
        return {
            "members": self.members,
            "parameters": self.parameters,
            "parameters_added": self.parameters_added,
            "parameter_overhead": self.parameter_overhead,
            "converted": self.converted,
            "skipped": self.skipped,
            "tied": self.tied,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        console = Console(width=110, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        sites = Table(title=f"Sites ({len(self.converted)})", title_justify="left")
        for column, justify in (
            ("site", "left"),
            ("layer", "left"),
            ("s", "right"),
            ("r", "right"),
            ("tied to", "left"),
        ):
            sites.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for name, kind in self.converted.items():
            size = self.sizes.get(name)
            s, r = ("", "") if size is None else (str(channels or "") for channels in size)
            s, r = s if self.factors != "outputs" else "", r if self.factors != "inputs" else ""
            sites.add_row(Text(name or "(the model)"), kind, s, r, Text(", ".join(self.tied.get(name, []))))
        parts: list[Any] = [sites]
        if self.skipped:
            skipped = Table(title=f"Not converted ({len(self.skipped)})", title_justify="left")
            skipped.add_column("name", overflow="fold")
            skipped.add_column("reason", overflow="fold")
            for name, reason in self.skipped.items():
                skipped.add_row(Text(name), Text(reason))
            parts.append(skipped)
        parts.append(
            Text(
                f"{self.members} members add {self.parameters_added:,} parameters to {self.parameters:,} "
                f"({100 * self.parameter_overhead:.2f} %)."
            )
        )
        parts.extend(Text(f"Note: {note}") for note in self.notes)
        yield Group(*parts)
