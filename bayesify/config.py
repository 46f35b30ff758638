"""Options of the conversion, one frozen dataclass."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bayesify.errors import ConfigError, FormatError

PosteriorName = Literal[
    "deterministic",
    "normal",
    "normal-shared-std",
    "normal-fixed-std",
    "log-normal",
    "cauchy",
    "half-cauchy",
    "mixture-of-deltas",
]
PriorName = Literal[
    "normal",
    "cauchy",
    "half-cauchy",
    "log-normal",
    "log-uniform",
    "uniform",
    "empirical-bayes",
    "tied-mean",
    "trainable-std",
]
InitName = Literal["ones", "normal", "random-sign"]
PerturbationName = Literal["multiplicative", "additive"]
FactorsName = Literal["both", "inputs", "outputs"]
NoiseName = Literal["example", "member"]
ReductionName = Literal["mean", "sum"]

POSITIVE = ("log-normal", "half-cauchy")
"""Posteriors whose draws are positive."""

_CHOICES = {
    "posterior": get_args(PosteriorName),
    "prior": get_args(PriorName),
    "init": get_args(InitName),
    "perturbation": get_args(PerturbationName),
    "factors": get_args(FactorsName),
    "noise": get_args(NoiseName),
    "kl_reduction": get_args(ReductionName),
}


def as_names(name: str, value: Any) -> tuple[str, ...]:
    """A name or names as a tuple; anything else is a `ConfigError`."""
    value = (value,) if isinstance(value, str) else value
    if not isinstance(value, (tuple, list)) or not all(isinstance(entry, str) for entry in value):
        raise ConfigError(f"{name} must hold names or patterns (str); found {value!r}.")
    return tuple(value)


def check_choices(config: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """Raise `ConfigError` unless each field holds one of its words."""
    for name, words in choices.items():
        if getattr(config, name) not in words:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} is unknown; expected one of {', '.join(map(repr, words))}."
            )


def check_flags(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless each field is a bool."""
    for name in names:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be True or False; found {getattr(config, name)!r}.")


def check_number(name: str, value: Any, allowed: str, holds: Callable[[Any], bool]) -> None:
    """Raise `ConfigError` unless the value is a number that holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
        raise ConfigError(f"{name} must be {allowed}; found {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Rank1Config:
    """How a network is made Bayesian.

    Args:
        members: K, the number of mixture components.
        posterior: family of every factor; "deterministic" gives BatchEnsemble.
        prior: family of the prior of every factor.
        prior_loc: location of the prior. By default the value at which a factor changes nothing: 1, or 0 where factors
            are added and in the log space of a log-normal prior; 0 for a half-Cauchy prior, whose support starts there.
        prior_scale: spread of the prior; with prior="trainable-std", where it starts. The 0.1 that was published pulls
            members together where data are few; 1 was better there, and never worse (measured: benchmarks/quality).
        init: where the posterior's locations start: at 1 ("ones"), drawn from N(1, init_scale²) ("normal"), or +1
            with probability sign_probability and −1 otherwise ("random-sign", as published: for training from scratch;
            it destroys pretrained features). Added factors start at or around 0, and have no signs; positive ones at
            exp(N(0, init_scale²)).
        init_scale: standard deviation of that draw; `None` is 1.5 / (number of sites), at most 0.5: what one site bears
            destroys a pretrained network of fifty (measured: benchmarks/quality).
        sign_probability: probability of +1 with init="random-sign".
        new_layers: patterns of layers without pretrained weights, such as a new head. With init="normal" the start of
            their input factors is multiplied by random signs, unless the posterior is positive or factors are added:
            members learn to differ there, and no pretrained features are lost (measured: benchmarks/quality).
        posterior_scale: spread of the posterior at the start.
        dropout_rate: the same spread given as the rate p of the equivalent Gaussian dropout,
            sqrt(p / (1 − p)). With neither given, p = 0.001 (spread 0.0316), as published.
        spread_jitter: standard deviation, cut at twice its size, of normal noise on the spread's parameter at the start
            (posteriors normal and log-normal); 0.1 was published.
        perturbation: weights are multiplied by r sᵀ, y = r ∘ (W (s ∘ x)) + b ("multiplicative"), or vectors are added,
            y = W (x + s) + r + b ("additive").
        factors: "both" perturbs a site's inputs (by s) and outputs (by r), otherwise only the one named.
        noise: one draw for each (member, example) row ("example", as published) or one for each member.
        embeddings: give embeddings factors, too, on their outputs: one for each of their columns.
        member_bias: give every member a bias of its own at each site that has one.
        member_batch_norm: give every member scale, shift and running statistics of its own in each batch norm.
        kl_reduction: "mean" over members bounds the KL of the mixture by convexity; "sum" is what the released
            code of the paper did.
        sites: where factors begin: everywhere ("all"), with the last of the network's stages ("last-stage"), after its
            stages ("head"), or with the module of that name; what is defined before has none, and is computed once for
            all members.
        include: patterns of site names to convert, of those; empty means all. A pattern is a full dotted name, which
            also selects everything beneath it, or a glob such as ``layer4.*.conv2``. They select the batch norms of
            member_batch_norm, too.
        exclude: patterns of site names to leave alone.

    Source: Dusenberry et al., "Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors", ICML 2020.
    """

    members: int = 4
    posterior: PosteriorName = "normal"
    prior: PriorName = "normal"
    prior_loc: float | None = None
    prior_scale: float = 1.0
    init: InitName = "normal"
    init_scale: float | None = None
    sign_probability: float = 0.5
    new_layers: tuple[str, ...] = ()
    posterior_scale: float | None = None
    dropout_rate: float | None = None
    spread_jitter: float = 0.0
    perturbation: PerturbationName = "multiplicative"
    factors: FactorsName = "both"
    noise: NoiseName = "example"
    embeddings: bool = False
    member_bias: bool = False
    member_batch_norm: bool = False
    kl_reduction: ReductionName = "mean"
    sites: str = "all"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("new_layers", "include", "exclude"):
            object.__setattr__(self, name, as_names(name, getattr(self, name)))
        if not isinstance(self.sites, str) or not self.sites:
            raise ConfigError(f"sites must be 'all', 'last-stage', 'head' or a module's name; found {self.sites!r}.")
        check_choices(self, _CHOICES)
        check_flags(self, "embeddings", "member_bias", "member_batch_norm")
        if isinstance(self.members, bool) or not isinstance(self.members, int) or self.members < 1:
            raise ConfigError(f"members must be a positive integer; found {self.members!r}.")
        if self.posterior_scale is not None and self.dropout_rate is not None:
            raise ConfigError("give posterior_scale or dropout_rate, not both: each sets the initial spread.")
        for name, allowed, holds in (
            ("prior_scale", "positive", lambda v: 0.0 < v < math.inf),
            ("init_scale", "finite and not negative", lambda v: 0.0 <= v < math.inf),
            ("sign_probability", "in [0, 1]", lambda v: 0.0 <= v <= 1.0),
            ("posterior_scale", "finite and not negative", lambda v: 0.0 <= v < math.inf),
            ("dropout_rate", "in [0, 1)", lambda v: 0.0 <= v < 1.0),
            ("spread_jitter", "finite and not negative", lambda v: 0.0 <= v < math.inf),
            ("prior_loc", "finite", math.isfinite),
        ):
            value = getattr(self, name)
            if value is not None or name not in ("init_scale", "posterior_scale", "dropout_rate", "prior_loc"):
                check_number(name, value, allowed, holds)
        self._check_meaning()

    def _check_meaning(self) -> None:
        """Refuse combinations of families that have no meaning."""
        from bayesify.distributions import check_pair

        if self.embeddings and self.factors == "inputs":
            raise ConfigError("embeddings have no inputs to perturb; set factors='both' or 'outputs'.")
        if self.perturbation == "additive" and self.init == "random-sign":
            raise ConfigError("init='random-sign' with perturbation='additive' would add ±1 to every input and output.")
        if self.posterior in POSITIVE and self.init == "random-sign":
            raise ConfigError(f"init='random-sign' starts at −1, which a {self.posterior} posterior cannot reach.")
        if self.posterior in POSITIVE and self.perturbation == "additive":
            raise ConfigError(
                f"perturbation='additive' needs factors around 0; those of a {self.posterior} posterior are positive."
            )
        check_pair(self.posterior, self.prior, self.prior_location)

    @property
    def neutral(self) -> float:
        """The value at which a factor changes nothing."""
        return 1.0 if self.perturbation == "multiplicative" else 0.0

    @property
    def prior_location(self) -> float:
        """`prior_loc`, or its default for this family."""
        if self.prior_loc is not None:
            return self.prior_loc
        return 0.0 if self.prior in POSITIVE else self.neutral

    @property
    def spread(self) -> float:
        """Standard deviation (or scale) of every factor at the start."""
        if self.posterior_scale is not None:
            return self.posterior_scale
        rate = 1e-3 if self.dropout_rate is None else self.dropout_rate
        return math.sqrt(rate / (1.0 - rate))

    @property
    def signed_start(self) -> bool:
        """Whether the start of factors in new layers can be given random signs."""
        return self.init == "normal" and self.perturbation == "multiplicative" and self.posterior not in POSITIVE

    def start_scale(self, sites: int = 1) -> float:
        """`init_scale`, or its default for a network with so many sites."""
        return min(0.5, 1.5 / max(1, sites)) if self.init_scale is None else self.init_scale

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


class NetworkConfig(Rank1Config):
    """The options of a converted network, with the network's own config behind them.

    A transformers network keeps its labels, sizes and special tokens in `config`, where pipelines and trainers look for
    them. What is no option of the conversion is read from that config, and written to it.
    """

    _own: Any = None

    @classmethod
    def over(cls, config: Rank1Config, own: Any) -> NetworkConfig:
        """The same options, over the config of a network."""
        result = cls(**_options(config))
        object.__setattr__(result, "_own", own)
        return result

    def __getattr__(self, name: str) -> Any:
        if self._own is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._own is None or name in _options(self):
            super().__setattr__(name, value)
        else:
            setattr(self._own, name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rank1Config) and _options(self) == _options(other)

    __hash__ = Rank1Config.__hash__


def _options(config: Rank1Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Rank1Config)}
