"""The original network: what it gives on the examples, and on the rows that members make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bayesify import BayesianModel
from bayesify.batch import Rows, diagonal_blocks, map_tensors
from bayesify.graph import site_name
from benchmarks.coverage.jobs import FailedStepError
from benchmarks.coverage.operands import linear_parameters

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call, with two examples."""

MEMBERS = 2
EXPANSION_TOLERANCE = 1e-4
"""Wider than that of the identity, because another batch size is another order of summation in the original, too."""


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


class Original:
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
        return any(gradient is not None and is_nonzero(gradient[1:]) for gradient in gradients)

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


def is_nonzero(gradient: Tensor | None, above: float = 0.0) -> bool:
    """Whether any element is larger; `None` is nothing."""
    return gradient is not None and not bool((gradient.abs() <= above).all())
