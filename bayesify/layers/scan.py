"""The scan of a recurrent layer in one direction: all steps as one operation with gradients of its own.

A step multiplies small matrices, so what counts is the number of calls and of passes through memory: everything is
written to memory that exists already, and whatever does not have to wait for the step before, forward or backward, is
done for a block of steps at once, while they are in the cache.

Legend: T steps, N rows, H hidden units; y = W (s ∘ h) and gates = x + r ∘ y, all [T, N, 4·H], where x is the part of
the inputs with both biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 20
"""Size of the gates of a block of steps: of the order of a core's cache."""
PACKED_STEPS = 8
"""Number of steps from which packing a weight for them pays: it takes about as long as two products of few rows."""

State = tuple[Tensor, ...]
"""h and c, both [N, H]."""


def scan(
    x: Tensor, weight: Tensor, s: Tensor | None, r: Tensor | None, state: State, reverse: bool
) -> tuple[Tensor, State]:
    """An LSTM from the gates of x, with both biases, to its outputs [T, N, H] and its final state.

    Args:
        x: [T, N, 4·H].
        weight: [4·H, H] of the hidden state.
        s, r: [N or 1, H] and [N or 1, 4·H], or nothing.
        state: h and c at the start.
        reverse: whether the last step comes first.
    """
    h, c = state
    tensors = (x, weight, s, r, h, c)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        output, last = _Scan.apply(*tensors, reverse)
    else:
        output, last = _without_gradients(*tensors, reverse)
    return output, (output[0 if reverse else -1], last)


def lstm(gx: Tensor, gh: Tensor, state: State) -> State:
    """One step: gates from x and from h [N, 4·H], old state -> new state."""
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _by_operations(
    x: Tensor, weight: Tensor, s: Tensor | None, r: Tensor | None, h: Tensor, c: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The definition, for gradients of gradients."""
    outputs = []
    for gx in reversed(x.unbind()) if reverse else x.unbind():
        y = (h if s is None else h * s) @ weight.t()
        h, c = lstm(gx, y if r is None else y * r, (h, c))
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs), c


def _without_gradients(
    x: Tensor, weight: Tensor, s: Tensor | None, r: Tensor | None, h: Tensor, c: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    output = x.new_empty(*x.shape[:2], weight.shape[1])
    gates, scaled, c, tanh = torch.empty_like(x[0]), torch.empty_like(h), c.clone(), torch.empty_like(c)
    step, across, parts = _Step(gates, r), _across(weight, *x.shape[:2]), gates.chunk(4, -1)
    inputs, outputs = x.unbind(), output.unbind()
    for t in _order(len(x), reverse):
        y = across(h if s is None else torch.mul(h, s, out=scaled))
        h = outputs[t]
        step(inputs[t], y, gates, parts, c, c, tanh, h)
    return output, c


def _across(matrix: Tensor, steps: int, rows: int) -> Callable[[Tensor], Tensor]:
    """x ↦ x Mᵀ of contiguous rows, for M [out, in] that many steps share.

    oneDNN, whose kernel a plain LSTM runs in, multiplies few rows in a third to a half of the time that BLAS takes.
    """
    plain = type(matrix) in (Tensor, torch.nn.Parameter) and matrix.device.type == "cpu"
    if plain and matrix.dtype == torch.float32 and steps >= PACKED_STEPS and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    transposed = matrix.t()
    return lambda x: x @ transposed


class _Step:
    """The arithmetic of a step."""

    def __init__(self, like: Tensor, r: Tensor | None) -> None:
        self.r = r
        # The tanh of a CPU takes several times as long as its sigmoid: tanh(x) = 2 σ(2x) − 1. In half precision the
        # difference would round small values away.
        precise = like.dtype in (torch.float32, torch.float64)
        self.minus_one = like.new_full((), -1.0) if precise and like.device.type == "cpu" else None

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        gates: Tensor,
        parts: Sequence[Tensor],
        old: Tensor,
        new: Tensor,
        tanh: Tensor,
        h: Tensor,
    ) -> None:
        """Writes gates [N, 4·H], whose parts are i, f, g and o, the new c, tanh(c) and h."""
        i, f, g, o = parts
        if self.r is None:
            torch.add(x, y, out=gates)
        else:
            torch.addcmul(x, y, self.r, out=gates)
        if self.minus_one is None:
            for part in (i, f, o):
                part.sigmoid_()
            g.tanh_()
        else:
            torch.add(g, g, out=g)
            gates.sigmoid_()
            torch.add(self.minus_one, g, alpha=2, out=g)
        torch.mul(f, old, out=new)
        new.addcmul_(i, g)
        if self.minus_one is None:
            torch.tanh(new, out=tanh)
        else:
            torch.add(new, new, out=tanh)
            tanh.sigmoid_()
            torch.add(self.minus_one, tanh, alpha=2, out=tanh)
        torch.mul(o, tanh, out=h)


class _Scan(torch.autograd.Function):
    """The scan with gradients. Saved: gates, y, c, tanh(c) and h of all steps, less than the fused kernel saves."""

    @staticmethod
    def forward(ctx: Any, *tensors_and_order: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, s, r, h, c, reverse = tensors_and_order
        steps, rows = x.shape[:2]
        size = weight.shape[1]
        of_r = r is not None and ctx.needs_input_grad[3]
        gates, tanh = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(steps, rows, size)
        output, cells = torch.empty_like(tanh), torch.empty_like(tanh)
        step, across, scaled, old_h, old_c = _Step(x, r), _across(weight, steps, rows), torch.empty_like(h), h, c
        products: list[Tensor] = []
        parts = list(zip(*(part.unbind() for part in gates.chunk(4, -1)), strict=True))
        of_steps = list(
            zip(x.unbind(), gates.unbind(), parts, cells.unbind(), tanh.unbind(), output.unbind(), strict=True)
        )
        for t in _order(steps, reverse):
            y = across(old_h if s is None else torch.mul(old_h, s, out=scaled))
            if of_r:
                products.append(y)
            here, own, own_parts, new, own_tanh, old_h = of_steps[t]
            step(here, y, own, own_parts, old_c, new, own_tanh, old_h)
            old_c = new
        ctx.reverse = reverse
        ctx.save_for_backward(x, weight, s, r, h, c, output, gates, cells, tanh, *products)
        return output, old_c.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            return _gradients_by_operations(ctx, grad, grad_last)
        x, weight, s, r, h, c, output, gates, cells, tanh, *products = ctx.saved_tensors
        reverse: bool = ctx.reverse
        of_x, of_weight, of_s, of_r, _, _, _ = ctx.needs_input_grad
        steps, rows = x.shape[:2]
        size = weight.shape[1]
        across = _across(weight.t(), steps, rows)
        d_x = torch.empty_like(gates) if of_x else None
        d_weight = torch.zeros_like(weight) if of_weight else None
        d_s = torch.zeros_like(h) if of_s else None
        d_r = torch.zeros_like(gates[0]) if of_r else None
        d_h, d_c = torch.zeros_like(h), grad_last.clone()
        for block in _blocks(steps, gates[0], reverse):
            old_h, old_c = _before(output, block, h, reverse), _before(cells, block, c, reverse)
            slopes = torch.empty_like(gates[block]) if d_x is None else d_x[block]
            of_c = _slopes(gates[block], old_c, tanh[block], slopes)
            back = torch.empty_like(slopes) if r is not None else slopes
            first = slopes.unflatten(-1, (4, size))
            for t in reversed(_order(len(old_h), reverse)):
                at = block.start + t
                d_h += grad[at]
                d_c.addcmul_(d_h, of_c[t])
                here = first[t]
                here[:, :3] *= d_c[:, None]
                here[:, 3] *= d_h
                d_c *= gates[at, :, size : 2 * size]
                if r is not None:
                    torch.mul(slopes[t], r, out=back[t])
                d_scaled = across(back[t])
                if d_r is not None:
                    d_r.addcmul_(slopes[t], products.pop())  # in the order in which they were computed
                if d_s is not None:
                    d_s.addcmul_(d_scaled, old_h[t])
                d_h = d_scaled if s is None else torch.mul(d_scaled, s, out=d_h)
            if d_weight is not None:
                scaled = old_h if s is None else old_h * s
                d_weight.addmm_(back.flatten(0, 1).t(), scaled.flatten(0, 1))
        d_s, d_r = (d if d is None or v is None else d.sum_to_size(v.shape) for d, v in ((d_s, s), (d_r, r)))
        return d_x, d_weight, d_s, d_r, d_h, d_c, None


def _gradients_by_operations(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, s, r, h, c = tensors = ctx.saved_tensors[:6]
    wanted = [t for t, needed in zip(tensors, ctx.needs_input_grad, strict=False) if needed]
    outputs = _by_operations(x, weight, s, r, h, c, ctx.reverse)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:6]), None


def _slopes(gates: Tensor, old: Tensor, tanh: Tensor, out: Tensor) -> Tensor:
    """Writes the derivatives of c by the gates i, f and g before their nonlinearity, and of h by o; gives those of h
    by c."""
    size = old.shape[-1]
    i, f, g, o = gates.split(size, -1)
    d_i, d_f, d_g, d_o = out.split(size, -1)
    _sigmoid_backward(g, i, d_i)
    _sigmoid_backward(old, f, d_f)
    _tanh_backward(i, g, d_g)
    _sigmoid_backward(tanh, o, d_o)
    return _tanh_backward(o, tanh, torch.empty_like(tanh))


def _sigmoid_backward(grad: Tensor, output: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.sigmoid_backward.grad_input(grad, output, grad_input=out)


def _tanh_backward(grad: Tensor, output: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward.grad_input(grad, output, grad_input=out)


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _blocks(steps: int, gates: Tensor, reverse: bool) -> Iterator[slice]:
    """Blocks of steps, the last to be computed first."""
    count = max(1, BLOCK_BYTES // max(1, gates.numel() * gates.element_size()))
    blocks = [slice(start, min(start + count, steps)) for start in range(0, steps, count)]
    return iter(blocks if reverse else blocks[::-1])


def _before(states: Tensor, block: slice, initial: Tensor, reverse: bool) -> Tensor:
    """[steps of the block, N, H] the states before each of its steps."""
    if reverse:
        after = states[block.start + 1 : block.stop + 1]
        return after if len(after) == block.stop - block.start else torch.cat([after, initial[None]])
    if block.start:
        return states[block.start - 1 : block.stop - 1]
    return torch.cat([initial[None], states[: block.stop - 1]])
