"""What is measured of one model: does it convert, what of it, and does the result keep the library's promises?

`check` runs the network; `conversion` converts it without weights. Both give a row with

* status, error: the first step that failed ("build", "base", "convert", "identity", "probe"), and how; or "ok".
* sites, routes, notes: from the library's report.
* linear_parameters, converted_parameters, share: parameters in linear maps, those of them that carry factors, and
  their ratio. Embeddings and other look-ups do not count. `check` knows them from the running network (`operands`),
  `conversion` from the report, where parameters of unknown use (unknown_parameters) do not count.
* skipped: what the report left out, grouped by reason, owner and name.

and `check` adds

* silent: parameters that entered a linear map and are neither converted nor in the report. A failure.
* identity, expansion: errors relative to the largest output, the worst over all real outputs: of the converted network
  at factors of 1, and of the original on repeated rows. Float32.
* not_reached, idle, not_finite: sites that the inputs never call, sites whose weight does not matter either, or next to
  nothing, and sites whose gradient is no number. Not failures of the conversion.
* still, behind, leaking: sites with a factor that does not move the output though the weight does, with a weight that
  is used but not with its factors, and with a factor of one row that moves another's output. Failures.
* random: the original draws random numbers in eval mode, so repeated rows differ in it.
* mixes_examples: in the original, one example's output depends on another's input; then so it may on its factors.
* with_inputs: the status when the conversion is given the inputs, where it fails without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bayesify import BayesianModel, ConversionReport, bayesify
from bayesify.batch import Rows, diagonal_blocks, map_tensors
from bayesify.graph import site_name
from bayesify.layers import Rank1Layer
from benchmarks.coverage.jobs import Row
from benchmarks.coverage.operands import linear_parameters

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call, with two examples."""

MEMBERS = 2
IDENTITY_TOLERANCE = 1e-5
EXPANSION_TOLERANCE = 1e-4
"""Wider, because another batch size is another order of summation in the original, too."""
ROUNDING = 1e-5
"""What subtracting a maximum over all examples before a softmax leaves of their gradients, relative."""
FAINT = 1e-30
"""A weight with a smaller gradient does not matter: those of its factors may round to zero in float32."""

_NO_LINEAR_MAP = ("an embedding looks rows up", "part of the layer", "its input does not carry the batch")
_UNKNOWN = "use unknown"


class FailedStepError(Exception):
    """A step failed; the row says which and how."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def step(status: str) -> Iterator[None]:
    try:
        yield
    except (FailedStepError, MemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        raise FailedStepError(status, f"{type(error).__name__}: {error}") from error


# ------------------------------------------------------------------------------------------------ the two measurements


def census(build: Callable[[], nn.Module]) -> Row:
    """How large a network is and what it is made of, to choose which ones to check."""
    model = build()
    classes = sorted({type(m).__name__ for m in model.modules() if _has_character(m)})
    return {"status": "ok", "parameters": sum(p.numel() for p in model.parameters()), "classes": classes}


def conversion(build: Callable[[], nn.Module]) -> Row:
    """Convert a network, usually one without weights, and account for them."""
    row: Row = {"status": "ok"}
    try:
        with step("build"):
            model = build()
            row["parameters"] = sum(p.numel() for p in model.parameters())
        with step("convert"):
            account = Account(model)
            report = bayesify(model, members=MEMBERS).report
            row |= account.of(report)
    except FailedStepError as failure:
        row |= {"status": failure.status, "error": str(failure)}
    return row


def check(build: Callable[[], tuple[nn.Module, Inputs]]) -> Row:
    """Every check on random weights; where one fails, once more with the inputs given to the conversion."""
    row = _check(build, give_inputs=False)
    if row["status"] in ("convert", "identity", "probe"):
        row["with_inputs"] = _check(build, give_inputs=True)["status"]
    return row


def _check(build: Callable[[], tuple[nn.Module, Inputs]], give_inputs: bool) -> Row:
    row: Row = {"status": "ok"}
    try:
        with step("build"):
            torch.manual_seed(0)
            model, inputs = build()
            model.float().eval()
            revive(model)
            row["parameters"] = sum(p.numel() for p in model.parameters())
        with step("base"):
            base = _Base(model, inputs)
            row |= {"mixes_examples": base.mixes_examples, "random": base.random, "expansion": base.expansion}
        with step("convert"):
            account = Account(model)
            example = (inputs[1] or inputs[0]) if give_inputs else None
            torch.manual_seed(0)
            bnn = bayesify(model, members=MEMBERS, init="ones", posterior_scale=0.0, example_inputs=example)
        with step("identity"):
            found = base.call(bnn)  # first, as users would: where the batch is may be seen on the first inputs
            row |= account.of(bnn.report, base.linear)
            row["identity"] = base.identity_of(bnn)
            _check_identity(base, bnn, found, row)
        with step("probe"):
            _probe(bnn, base, row)
            if row["silent"]:
                raise FailedStepError("probe", f"neither converted nor reported: {', '.join(row['silent'][:5])}")
    except FailedStepError as failure:
        row |= {"status": failure.status, "error": str(failure)}
    return row


# ------------------------------------------------------------------------------------------------ the original


@torch.no_grad()
def revive(model: nn.Module) -> None:
    """Replace what starts constant or tiny (zero heads, gates, layer scales) by values that let errors through.

    Matrices get the spread of a usual start, gates and scales values around 0.75, biases small ones; running
    statistics differ by channel.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        largest = parameter.abs().max()
        if bool(torch.isfinite(largest)) and largest >= 1e-3 and float(parameter.std(unbiased=False)) > 0:
            continue
        if sum(size > 1 for size in parameter.shape) > 1:
            parameter.normal_(0.0, (parameter.numel() / parameter.shape[0]) ** -0.5)
        elif "bias" in name.rpartition(".")[2]:
            parameter.normal_(0.0, 0.1)
        else:
            parameter.uniform_(0.5, 1.0)
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(module, _NormBase) or "Norm" in type(module).__name__:
            if isinstance(mean, Tensor):
                mean.normal_(0.0, 0.1)
            if isinstance(variance, Tensor):
                variance.uniform_(0.5, 1.5)


class _Base:
    """The original network on the inputs, and on the rows that two members make of them.

    Attributes:
        linear: names of the parameters that enter linear maps.
        outputs: real tensors of the output on the examples.
        repeated: the same on repeated rows.
        batch_dims: where each output has the batch, `None` where it has none.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self.rows = Rows(model)
        self.batch = self.rows.batch_size(*inputs)
        torch.manual_seed(1)
        output, self.linear = linear_parameters(model, *inputs)
        self.of_each = False
        self.outputs = self.read(output)
        if not self.outputs:
            raise FailedStepError("base", f"no real tensor in the output ({type(output).__name__})")
        if not all(bool(torch.isfinite(o).any()) for o in self.outputs):
            raise FailedStepError("base", "an output is not finite, so nothing can be compared")
        self.expanded = self.rows.expand(*inputs, MEMBERS)
        try:
            self.repeated = self.run(*self.expanded)
        except Exception as error:
            raise FailedStepError(
                "identity", f"repeated rows do not fit the original: {type(error).__name__}: {error}"
            ) from error
        if len(self.repeated) != len(self.outputs):  # a list with a tensor for each image
            self.of_each = True
            self.outputs, self.repeated = self.read(output), self.run(*self.expanded)
        self.random = self._is_random()
        self.batch_dims = [_batch_dim(o, r) for o, r in zip(self.outputs, self.repeated, strict=True)]
        self.expansion = max(
            max(relative_error(member, o) for member in _members(r, dim, o))
            for o, r, dim in zip(self.outputs, self.repeated, self.batch_dims, strict=True)
        )
        self.mixes_examples = self._mixes()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        torch.manual_seed(1)
        return self.read(self.model(*args, **kwargs))

    def read(self, output: Any) -> list[Tensor]:
        """What is compared: every real tensor, or the one of the predictions where their number follows the batch."""
        return [self.rows.outputs(output)] if self.of_each else real_tensors(output)

    def _is_random(self) -> bool:
        """Whether the original draws random numbers in eval mode, too."""
        torch.manual_seed(4)
        again = self.read(self.model(*self.inputs[0], **self.inputs[1]))
        shapes = [o.shape for o in again], [o.shape for o in self.outputs]
        if shapes[0] != shapes[1]:
            raise FailedStepError("base", "the shapes of the outputs are random, so nothing can be compared")
        return any(relative_error(a, o) > EXPANSION_TOLERANCE for a, o in zip(again, self.outputs, strict=True))

    @torch.no_grad()
    def call(self, bnn: BayesianModel) -> list[Tensor]:
        """The real outputs of the Bayesian model's own call, the predictive, on the examples."""
        torch.manual_seed(1)
        return self.read(bnn.eval()(*self.inputs[0], **self.inputs[1]))

    def identity_of(self, bnn: BayesianModel) -> float:
        """The error of the converted network, at factors of 1, on the same repeated rows."""
        with torch.no_grad():
            hold(bnn, MEMBERS * self.batch, 0.0)
            found = self.run(*self.expanded)
        return max(relative_error(f, r) for f, r in zip(found, self.repeated, strict=True))

    def first_row(self, outputs: list[Tensor], rows: int) -> Tensor | None:
        """A random projection of what belongs to the first of the rows; `None` where nothing of it has a gradient."""
        generator = torch.Generator().manual_seed(3)
        terms = [
            (first.float().nan_to_num(0, 0, 0) * torch.randn(first.shape, generator=generator)).sum()
            for first in self._first(outputs, rows)
            if first.requires_grad
        ]
        return torch.stack(terms).sum() if terms else None

    def _first(self, outputs: list[Tensor], rows: int) -> list[Tensor]:
        pairs = zip(outputs, self.batch_dims, strict=True)
        return [o.narrow(dim, 0, max(1, o.shape[dim] // rows)) for o, dim in pairs if dim is not None]

    def _mixes(self) -> bool:
        """Whether the first example's output depends on the others: it changes when they become copies of the first,
        or has a gradient there."""

        def copy_first(value: Any) -> Any:
            return value[:1].expand_as(value).clone() if self._has_batch(value) else value

        try:
            copied = self.run(*map_tensors(self.inputs, copy_first))
            before, after = self._first(self.outputs, self.batch), self._first(copied, self.batch)
        except Exception:
            return True  # what examples may be asked together depends on them
        if any(relative_error(a, b) > EXPANSION_TOLERANCE for a, b in zip(after, before, strict=True)):
            return True
        leaves: list[Tensor] = []

        def note(value: Any) -> Any:
            if not (self._has_batch(value) and value.is_floating_point()):
                return value
            leaves.append(value.detach().clone().requires_grad_())
            return leaves[-1]

        with torch.enable_grad():
            loss = self.first_row(self.run(*map_tensors(self.inputs, note)), self.batch)
        if loss is None or not leaves:
            return False
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        return any(gradient is not None and _is_nonzero(gradient[1:]) for gradient in gradients)

    def _has_batch(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == self.batch


def real_tensors(output: Any) -> list[Tensor]:
    """Every tensor of real values in an output, caches aside: they keep the rows of all members for the next call."""
    found: list[Tensor] = []
    if isinstance(output, Mapping):
        output = {name: value for name, value in output.items() if name not in ("mems", "past_key_values")}

    def note(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            found.append(value)
        return value

    map_tensors(output, note)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference beside the largest value; what is infinite in both does not count."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().float(), expected.detach().float()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    return float((found - expected)[finite].abs().max()) / (float(expected[finite].abs().max()) or 1.0)


def _batch_dim(once: Tensor, repeated: Tensor) -> int | None:
    """The dimension that grew with the rows."""
    if once.dim() != repeated.dim():
        raise FailedStepError("identity", f"repeated rows change {tuple(once.shape)} to {tuple(repeated.shape)}")
    grown = [d for d in range(once.dim()) if repeated.shape[d] != once.shape[d]]
    if grown == [0, 1] and once.dim() == 2 and repeated.shape == tuple(MEMBERS * size for size in once.shape):
        return 0  # similarities of every example with every other
    if len(grown) > 1 or any(repeated.shape[d] != MEMBERS * once.shape[d] for d in grown):
        raise FailedStepError("identity", f"repeated rows change {tuple(once.shape)} to {tuple(repeated.shape)}")
    return grown[0] if grown else None


def _members(output: Tensor, dim: int | None, once: Tensor) -> tuple[Tensor, ...]:
    if dim is None:
        return (output,)
    members = output.chunk(MEMBERS, dim)
    return members if members[0].shape == once.shape else tuple(diagonal_blocks(output, MEMBERS))


# ------------------------------------------------------------------------------------------------ identity and probe


_KINDS = ("not_reached", "idle", "not_finite", "still", "behind", "leaking")


def hold(bnn: BayesianModel, rows: int, spread: float) -> dict[tuple[str, str, str], Tensor]:
    """Put draws [rows, d] around 1 in force; returns them by (layer, site, side)."""
    generator = torch.Generator().manual_seed(2)
    draws: dict[tuple[str, str, str], Tensor] = {}
    for layer, module in bnn.layers():
        for weight, site in module.rank1.items():
            for side in ("s", "r"):
                factor = getattr(site, side)
                draw = 1.0 + spread * torch.randn(rows, factor.size, generator=generator)
                factor.hold(draw.requires_grad_(spread > 0))
                draws[layer, site_name(layer, weight), side] = draw
    return draws


def _check_identity(base: _Base, bnn: BayesianModel, found: list[Tensor], row: Row) -> None:
    if not row["identity"] <= IDENTITY_TOLERANCE:
        raise FailedStepError("identity", f"at factors of 1 the outputs differ by {row['identity']:.2g}")
    if not (base.mixes_examples or base.random) and not base.expansion <= EXPANSION_TOLERANCE:
        raise FailedStepError("identity", f"on repeated rows the original itself differs by {base.expansion:.2g}")
    expected = base.repeated if bnn.task == "members" else base.outputs  # sets of objects are not averaged
    shapes = [tuple(o.shape) for o in expected], [tuple(o.shape) for o in found]
    if shapes[0] != shapes[1]:
        pairs = [f"{a} to {b}" for a, b in zip(*shapes, strict=False) if a != b]
        raise FailedStepError("identity", f"the Bayesian model's own call changes shapes: {', '.join(pairs[:3])}")


def _probe(bnn: BayesianModel, base: _Base, row: Row) -> None:
    """One backward pass from the first row at factors around 1: each site's own factors move it, nobody else's do.

    Sites where something is wrong or remarkable go to the row, by kind, see `_verdict`.
    """
    rows = MEMBERS * base.batch
    untie(bnn.model)
    draws = hold(bnn, rows, 0.1)
    with torch.enable_grad():
        loss = base.first_row(base.run(*base.expanded), rows)
    if loss is None:
        raise FailedStepError("probe", "no output with a batch depends on the converted layers")
    layers = dict(bnn.layers())
    weights = {layer: _weights_of(module) for layer, module in layers.items()}
    flat = [p for group in weights.values() for p in group]
    gradients = torch.autograd.grad(loss, [*draws.values(), *flat], allow_unused=True)
    by_weight = {id(p): g for p, g in zip(flat, gradients[len(draws) :], strict=True)}
    found: dict[str, set[str]] = {kind: set() for kind in _KINDS}
    for (layer, site, _), gradient in zip(draws, gradients, strict=False):
        matters = any(_is_nonzero(by_weight[id(p)], above=FAINT) for p in weights[layer])
        kind = _verdict(gradient, matters, knows=bool(weights[layer]))
        if kind:
            found[kind].add(site)
    row |= {kind: sorted(names) for kind, names in found.items()}
    failures = [
        ("a factor does not move the output, though the weight does", row["still"]),
        ("the weight is used without its factors", row["behind"]),
        ("a factor of one row moves the output of another", [] if base.mixes_examples else row["leaking"]),
    ]
    for text, names in failures:
        if names:
            raise FailedStepError("probe", f"{len(names)} of {len(draws) // 2} sites, e.g. {names[0]}: {text}")


def untie(model: nn.Module) -> None:
    """Give every module parameters of its own, so that the gradient of a weight is that of this use of it."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(id(parameter))


def _weights_of(layer: Rank1Layer) -> list[nn.Parameter]:
    """The parameters that the layer's factors belong to, as far as they have gradients."""
    own = [layer.weight_of(name) for name in layer.rank1]
    if not all(isinstance(weight, nn.Parameter) for weight in own):  # computed from others, as by weight norm
        own = [p for n, p in layer.named_parameters() if p.dim() > 1 and "rank1." not in n]
    return [weight for weight in own if isinstance(weight, nn.Parameter) and weight.requires_grad]


def _verdict(gradient: Tensor | None, matters: bool, knows: bool) -> str | None:
    """What is wrong or remarkable about a factor, given its gradient [rows, d] for the output of the first row."""
    if gradient is None:
        return "behind" if matters else "not_reached"
    if not bool(torch.isfinite(gradient).all()):
        return "not_finite"
    own, others = float(gradient[0].abs().max()), float(gradient[1:].abs().max())
    if others > ROUNDING * own:
        return "leaking"
    if own == 0.0:
        return "still" if matters or not knows else "idle"
    return None


def _is_nonzero(gradient: Tensor | None, above: float = 0.0) -> bool:
    return gradient is not None and not bool((gradient.abs() <= above).all())


# ------------------------------------------------------------------------------------------------ the account


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
    match = re.fullmatch(r"((?:raw parameter, )?(?:used through \S+ in|may be read in|given to)) (.*?)(, .*)", text)
    if match:
        return f"{match[1]}{match[3]}", "" if match[2] == "the model" else match[2]
    if text.startswith("part of the layer "):
        return "a part of a converted layer", None
    if text.startswith("its own forward failed"):
        return "its own forward failed on a random input", None
    return text, None


def _has_character(module: nn.Module) -> bool:
    """Modules whose presence makes a variant worth a check of its own: code of the library's, or a weight."""
    own = next(module.parameters(recurse=False), None) is not None
    return own or not type(module).__module__.startswith("torch.nn")
