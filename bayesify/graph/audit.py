"""Check a conversion on example inputs: identity, reach and separation, before the caller gets the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bayesify.batch import Rows, diagonal_blocks, map_tensors
from bayesify.config import Rank1Config
from bayesify.errors import ConversionError
from bayesify.graph.inputs import Inputs
from bayesify.graph.plan import Plan, site_name
from bayesify.graph.rewrite import restore, swap
from bayesify.layers import MemberNorm, MemberVector
from bayesify.modes import differentiable_recurrence, evaluating, full_float32

_TOLERANCE = 1e-4
"""Relative. Networks of few bits get ten of their own rounding errors: 1e-2 in float16, 8e-2 in bfloat16."""


def audit(model: nn.Module, inputs: Inputs, plan: Plan, config: Rank1Config) -> None:
    """Try the plan on example inputs and leave the model as it was.

    Sites that the inputs do not reach move to `plan.skipped`.

    Raises:
        ConversionError: with every factor at 1 a member does not reproduce the network, or an example's output
            depends on another row's factors.
    """
    rows = Rows(model)
    batch = rows.batch_size(*inputs)
    args, kwargs = rows.expand(*inputs, 2)
    with evaluating(model), full_float32(), differentiable_recurrence(model):
        try:
            with torch.no_grad():
                expected = model(*inputs[0], **inputs[1])
        except Exception as error:
            raise ConversionError(
                f"the network itself fails on example_inputs: {type(error).__name__}: {error}. Give the inputs of one "
                "call: a tensor, a tuple of positional or a mapping of keyword arguments."
            ) from error
        with torch.random.fork_rng(devices=[]):
            swap(plan, config)
        try:
            draws = _hold_neutral(plan, 2 * batch, config)
            with torch.enable_grad():
                found = model(*args, **kwargs)
        except Exception as error:
            raise ConversionError(
                f"the converted network fails where the original does not: {type(error).__name__}: {error} "
                "Leave layers out with exclude= to find the one at fault."
            ) from error
        finally:
            restore(list(model.modules()))
    reference, outputs = _real(expected, rows), _real(found, rows)
    if len(reference) != len(outputs):  # a list with a tensor for each image
        reference, outputs = [rows.outputs(expected)], [rows.outputs(found)]
    pairs = list(zip(reference, outputs, strict=True))
    _check_identity(pairs, config.neutral)
    separate = [(expected, found) for expected, found in pairs if not _pairwise(expected, found)]
    _check_reach(plan, separate or pairs, draws, batch)


def _hold_neutral(plan: Plan, rows: int, config: Rank1Config) -> dict[tuple[str, str, str], Tensor]:
    """Draws [rows, d] that change nothing and record gradients, by (layer, site name, side); two members in force."""
    draws: dict[tuple[str, str, str], Tensor] = {}
    for name, layer in plan.layers.items():
        for weight, site in layer.rank1.items():  # type: ignore[operator]
            for side in ("s", "r"):
                factor = getattr(site, side)
                if factor is not None:
                    shape = (rows, factor.size)
                    draw = torch.full(shape, config.neutral, device=factor.loc.device, requires_grad=True)
                    factor.hold(draw)
                    draws[name, site_name(name, weight), side] = draw
    for layer in (*plan.layers.values(), *plan.norms.values()):
        for part in layer.modules():
            if isinstance(part, (MemberVector, MemberNorm)):
                part.hold(slice(0, min(2, config.members)))
    return draws


def _check_identity(pairs: list[tuple[Tensor, Tensor]], neutral: float) -> None:
    for expected, found in pairs:
        dim = _grown_dim(expected, found)
        if dim is None:
            continue
        scale = float(expected.nan_to_num(0, 0, 0).abs().max()) or 1.0
        tolerance = max(_TOLERANCE, 10 * torch.finfo(expected.dtype).eps)
        members = diagonal_blocks(found, 2) if _pairwise(expected, found) else found.chunk(2, dim)
        for member in members:
            error = _difference(member.detach().float(), expected.float()) / scale
            if not error <= tolerance:
                raise ConversionError(
                    f"with every factor at {neutral:g} the converted network differs from the original by {error:.2g} "
                    f"(relative; expected at most {tolerance:.0e}). "
                    "Leave layers out with exclude= to find the one at fault."
                )


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference. What is masked with infinity has to be so in both, and does not count otherwise."""
    differences = torch.where(found == expected, 0.0, (found - expected).abs())
    return float(differences.max())


def _grown_dim(expected: Tensor, found: Tensor) -> int | None:
    """Which dimension of an output holds the rows: the first that doubled with them."""
    if expected.dim() != found.dim():
        return None
    return next((d for d in range(found.dim()) if found.shape[d] == 2 * expected.shape[d]), None)


def _pairwise(expected: Tensor, found: Tensor) -> bool:
    """Whether an output compares every example with every other, as in contrastive models."""
    square = expected.dim() == 2 and expected.shape[0] == expected.shape[1]
    return square and found.shape == (2 * len(expected), 2 * len(expected))


@torch.enable_grad()
def _check_reach(
    plan: Plan, pairs: list[tuple[Tensor, Tensor]], draws: dict[tuple[str, str, str], Tensor], batch: int
) -> None:
    """One backward pass from the first row alone: its own factors must move it, nobody else's may.

    `pairs` are outputs of the original on the batch and of the converted network on two copies of it.
    """
    first = [
        found.narrow(dim, 0, max(1, expected.shape[dim] // batch))
        for expected, found in pairs
        if found.requires_grad and (dim := _grown_dim(expected, found)) is not None
    ]
    if not first:
        raise ConversionError("no output of the network depends on its converted layers on the example inputs.")
    generator = torch.Generator().manual_seed(0)
    finite = [o.float().nan_to_num(0, 0, 0) for o in first]
    rounding = 100 * max(torch.finfo(o.dtype).eps for o in first)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o.device)).sum() for o in finite)
    gradients = torch.autograd.grad(loss, list(draws.values()), allow_unused=True)  # type: ignore[arg-type]
    reached: set[str] = set()
    still: set[str] = set()
    for (layer, name, _), gradient in zip(draws, gradients, strict=True):
        if gradient is None:
            continue
        reached.add(layer)
        own, others = float(gradient[0].abs().max()), float(gradient[1:].abs().max())
        if others > rounding * own:
            raise ConversionError(
                f"the output of one example depends on another row's factors at {name}: the batch is not in the first "
                f"dimension there. Leave the layer out with exclude={name!r}."
            )
        if own == 0.0:
            still.add(name)
    plan.notes.extend(f"the factors of {name} do not move the output on the example inputs" for name in sorted(still))
    for layer in [name for name in plan.layers if name not in reached]:
        plan.skip(layer, "not called on the example inputs")
    if not plan.layers:
        raise ConversionError(
            "no output of the network depends on its converted layers on the example inputs. Not called: "
            f"{', '.join(sorted({layer for layer, _, _ in draws}))}. Give inputs that reach them, or include others."
        )


def _real(output: Any, rows: Rows) -> list[Tensor]:
    if rows.recurrent:
        return [rows.outputs(output)]  # the states have their batch elsewhere
    found: list[Tensor] = []

    def note(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            found.append(value)
        return value

    map_tensors(output, note)
    return found
