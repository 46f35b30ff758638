"""Options of the conversion, one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bayesify.errors import ConfigError, FormatError

PosteriorName = Literal["deterministic", "normal"]
PriorName = Literal["normal"]
InitName = Literal["ones", "normal"]
FactorsName = Literal["both", "inputs", "outputs"]
NoiseName = Literal["example", "member"]
ReductionName = Literal["mean", "sum"]

_CHOICES = {
    "posterior": get_args(PosteriorName),
    "prior": get_args(PriorName),
    "init": get_args(InitName),
    "factors": get_args(FactorsName),
    "noise": get_args(NoiseName),
    "kl_reduction": get_args(ReductionName),
}


@dataclass(frozen=True, kw_only=True)
class Rank1Config:
    """How a network is made Bayesian.

    Args:
        members: K, the number of mixture components.
        posterior: family of every factor; "deterministic" gives BatchEnsemble.
        prior: family of the prior of every factor.
        prior_loc: location of the prior; 1 leaves the pretrained weight as it is.
        prior_scale: spread of the prior.
        init: where the posterior's locations start: exactly 1 ("ones") or drawn from N(1, init_scale²) ("normal").
        init_scale: standard deviation of that draw.
        posterior_scale: spread of the posterior at the start.
        dropout_rate: the same spread given as the rate p of the equivalent Gaussian dropout,
            sqrt(p / (1 − p)). With neither given, p = 0.001 (spread 0.0316), as published.
        factors: "both" scales a site's inputs (s) and outputs (r), otherwise only the one named.
        noise: one draw for each (member, example) row ("example", as published) or one for each member.
        kl_reduction: "mean" over members bounds the KL of the mixture by convexity; "sum" is what the released
            code of the paper did.
        include: patterns of site names to convert; empty means all. A pattern is a full dotted name, which
            also selects everything beneath it, or a glob such as ``layer4.*.conv2``.
        exclude: patterns of site names to leave alone.

    Source: Dusenberry et al., "Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors", ICML 2020.
    """

    members: int = 4
    posterior: PosteriorName = "normal"
    prior: PriorName = "normal"
    prior_loc: float = 1.0
    prior_scale: float = 0.1
    init: InitName = "normal"
    init_scale: float = 0.1
    posterior_scale: float | None = None
    dropout_rate: float | None = None
    factors: FactorsName = "both"
    noise: NoiseName = "example"
    kl_reduction: ReductionName = "mean"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if not all(isinstance(pattern, str) for pattern in value):
                raise ConfigError(f"{name} must hold names or patterns (str); found {value!r}.")
            object.__setattr__(self, name, tuple(value))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown; expected one of {', '.join(map(repr, choices))}."
                )
        if isinstance(self.members, bool) or not isinstance(self.members, int) or self.members < 1:
            raise ConfigError(f"members must be a positive integer; found {self.members!r}.")
        if self.posterior_scale is not None and self.dropout_rate is not None:
            raise ConfigError("give posterior_scale or dropout_rate, not both: each sets the initial spread.")
        for name, low, high in (
            ("prior_scale", 0.0, math.inf),
            ("init_scale", -1e-300, math.inf),
            ("posterior_scale", -1e-300, math.inf),
            ("dropout_rate", -1e-300, 1.0),
            ("prior_loc", -math.inf, math.inf),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
                allowed = "positive" if low == 0.0 else "in [0, 1)" if high == 1.0 else "finite and not negative"
                if name == "prior_loc":
                    allowed = "finite"
                raise ConfigError(f"{name} must be {allowed}; found {value!r}.")

    @property
    def spread(self) -> float:
        """Standard deviation (or scale) of every factor at the start."""
        if self.posterior_scale is not None:
            return self.posterior_scale
        rate = 1e-3 if self.dropout_rate is None else self.dropout_rate
        return math.sqrt(rate / (1.0 - rate))

    def non_defaults(self) -> dict[str, Any]:
        """The fields that differ from their defaults, ready for JSON."""
        pairs = ((field, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field, value in pairs
            if value != field.default
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Rank1Config:
        """Read what `non_defaults` wrote. Unknown fields and bad values raise `FormatError` naming `source`."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise FormatError(f"{source}: unknown field {unknown[0]!r}; expected some of {', '.join(sorted(known))}.")
        try:
            return cls(**values)
        except (ConfigError, TypeError) as error:
            raise FormatError(f"{source}: {error}") from error
