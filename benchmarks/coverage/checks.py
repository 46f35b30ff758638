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

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bayesify import BayesianModel, bayesify
from bayesify.layers import Rank1Layer
from benchmarks.coverage.account import Account
from benchmarks.coverage.jobs import FailedStepError, Row, step
from benchmarks.coverage.original import (
    EXPANSION_TOLERANCE,
    MEMBERS,
    Inputs,
    Original,
    hold,
    is_nonzero,
    revive,
)

IDENTITY_TOLERANCE = 1e-5
ROUNDING = 1e-5
"""What subtracting a maximum over all examples before a softmax leaves of their gradients, relative."""
FAINT = 1e-30
"""A weight with a smaller gradient does not matter: those of its factors may round to zero in float32."""


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
            base = Original(model, inputs)
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


def _has_character(module: nn.Module) -> bool:
    """Modules whose presence makes a variant worth a check of its own: code of the library's, or a weight."""
    own = next(module.parameters(recurse=False), None) is not None
    return own or not type(module).__module__.startswith("torch.nn")


# ------------------------------------------------------------------------------------------------ identity and probe


_KINDS = ("not_reached", "idle", "not_finite", "still", "behind", "leaking")


def _check_identity(base: Original, bnn: BayesianModel, found: list[Tensor], row: Row) -> None:
    if not row["identity"] <= IDENTITY_TOLERANCE:
        raise FailedStepError("identity", f"at factors of 1 the outputs differ by {row['identity']:.2g}")
    if not (base.mixes_examples or base.random) and not base.expansion <= EXPANSION_TOLERANCE:
        raise FailedStepError("identity", f"on repeated rows the original itself differs by {base.expansion:.2g}")
    expected = base.repeated if bnn.task == "members" else base.outputs  # sets of objects are not averaged
    shapes = [tuple(o.shape) for o in expected], [tuple(o.shape) for o in found]
    if shapes[0] != shapes[1]:
        pairs = [f"{a} to {b}" for a, b in zip(*shapes, strict=False) if a != b]
        raise FailedStepError("identity", f"the Bayesian model's own call changes shapes: {', '.join(pairs[:3])}")


def _probe(bnn: BayesianModel, base: Original, row: Row) -> None:
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
        matters = any(is_nonzero(by_weight[id(p)], above=FAINT) for p in weights[layer])
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
