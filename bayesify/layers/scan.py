"""The scan of a recurrent layer in one direction: all steps as one operation with gradients of its own.

A step multiplies small matrices, so what counts is the number of calls and of passes through memory: everything is
written to memory that exists already, and whatever does not have to wait for the step before, forward or backward, is
done for a block of steps at once, while they are in the cache.

tanh(v) = 1 − 2 σ(−2v): one sigmoid does for all gates where the part of g comes multiplied by −2 (`signs`), and the
sigmoid of a CPU takes a fraction of the time of its tanh. With q = σ(−2 g) and u = σ(−2 c), i ∘ tanh(g) = i − 2 i ∘ q
and h = o ∘ tanh(c) = o − 2 o ∘ u are one operation each. (In half precision the differences would round small values
away, so it keeps to the loop over cells.)

Legend: T steps, N rows, H hidden units; y = W (s ∘ h) and gates = x + r ∘ y, all [T, N, 4·H], where x is the part of
the inputs with both biases; x and r come multiplied by the signs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bayesify.layers.matmul import linear, packed

BLOCK_BYTES = 1 << 20
"""Size of the gates of a block of steps: of the order of a core's cache."""
PACKED_STEPS = 8
"""Number of steps from which laying out a weight for them pays: it takes about as long as two products of few rows."""
TRANSPOSED_ROWS = 16
"""Number of rows from which BLAS takes half the time if what it reads of a transposed weight lies in one piece."""

State = tuple[Tensor, ...]
"""h and c, both [N, H]."""


def signs(size: int, like: Tensor) -> Tensor:
    """[4·H] what the gates i, f, g and o come multiplied by."""
    return like.new_tensor([1.0, 1.0, -2.0, 1.0]).repeat_interleave(size)


def scan(x: Tensor, weight: Tensor, s: Tensor | None, r: Tensor, state: State, reverse: bool) -> tuple[Tensor, State]:
    """An LSTM from the gates of x, with both biases, to its outputs [T, N, H] and its final state.

    Args:
        x: [T, N, 4·H], multiplied by `signs`.
        weight: [4·H, H] of the hidden state.
        s: [N or 1, H] or nothing.
        r: [N or 1, 4·H], multiplied by `signs`.
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


def _by_operations(
    x: Tensor, weight: Tensor, s: Tensor | None, r: Tensor, h: Tensor, c: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The definition, for gradients of gradients."""
    outputs = []
    for here in reversed(x.unbind()) if reverse else x.unbind():
        y = (h if s is None else h * s) @ weight.t()
        i, f, q, o = (here + r * y).sigmoid().chunk(4, -1)
        c = f * c + i * (1 - 2 * q)
        h = o * (1 - 2 * (-2 * c).sigmoid())
        outputs.append(h)
    return torch.stack(outputs[::-1] if reverse else outputs), c


def _without_gradients(
    x: Tensor, weight: Tensor, s: Tensor | None, r: Tensor, h: Tensor, c: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    output = x.new_empty(*x.shape[:2], weight.shape[1])
    gates, scaled, c, u = torch.empty_like(x[0]), torch.empty_like(h), c.clone(), torch.empty_like(c)
    step, across, parts = _Step(r), _across(weight, len(x), h), gates.chunk(4, -1)
    inputs, outputs = x.unbind(), output.unbind()
    for t in _order(len(x), reverse):
        y = across(h if s is None else torch.mul(h, s, out=scaled))
        h = outputs[t]
        step(inputs[t], y, gates, parts, c, c, u, h)
    return output, c


def _across(matrix: Tensor, steps: int, like: Tensor) -> Callable[[Tensor], Tensor]:
    """x ↦ x Mᵀ of contiguous rows such as `like` [N, in], for M [out, in] that many steps share."""
    transposed = matrix.t()
    if steps >= PACKED_STEPS:
        laid_out = packed(matrix, like)
        if laid_out is not matrix:
            return lambda x: linear(x, laid_out)
        if len(like) >= TRANSPOSED_ROWS:
            transposed = transposed.contiguous()
    return lambda x: torch.mm(x, transposed)


class _Step:
    """The arithmetic of a step."""

    def __init__(self, r: Tensor) -> None:
        self.r, self.minus_two = r, r.new_full((), -2.0)

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        gates: Tensor,
        parts: Sequence[Tensor],
        old: Tensor,
        new: Tensor,
        u: Tensor,
        h: Tensor,
    ) -> None:
        """Writes gates [N, 4·H], whose parts are i, f, q and o, the new c, u and h."""
        i, f, q, o = parts
        torch.addcmul(x, y, self.r, out=gates)
        gates.sigmoid_()
        torch.addcmul(i, i, q, value=-2, out=u)
        torch.addcmul(u, f, old, out=new)
        torch.mul(new, self.minus_two, out=u)
        u.sigmoid_()
        torch.addcmul(o, o, u, value=-2, out=h)


class _Scan(torch.autograd.Function):
    """The scan with gradients. Saved: gates, y, c, u and h of all steps, less than the fused kernel saves."""

    @staticmethod
    def forward(ctx: Any, *tensors_and_order: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, s, r, h, c, reverse = tensors_and_order
        steps, rows = x.shape[:2]
        size = weight.shape[1]
        of_r = ctx.needs_input_grad[3]
        gates, us = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(steps, rows, size)
        output, cells = torch.empty_like(us), torch.empty_like(us)
        step, across, scaled, old_h, old_c = _Step(r), _across(weight, steps, h), torch.empty_like(h), h, c
        products: list[Tensor] = []
        parts = list(zip(*(part.unbind() for part in gates.chunk(4, -1)), strict=True))
        of_steps = list(
            zip(x.unbind(), gates.unbind(), parts, cells.unbind(), us.unbind(), output.unbind(), strict=True)
        )
        for t in _order(steps, reverse):
            y = across(old_h if s is None else torch.mul(old_h, s, out=scaled))
            if of_r:
                products.append(y)
            here, own, own_parts, new, u, old_h = of_steps[t]
            step(here, y, own, own_parts, old_c, new, u, old_h)
            old_c = new
        ctx.reverse = reverse
        ctx.save_for_backward(x, weight, s, r, h, c, output, gates, cells, us, *products)
        return output, old_c.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            return _gradients_by_operations(ctx, grad, grad_last)
        x, weight, s, r, h, c, output, gates, cells, us, *products = ctx.saved_tensors
        reverse: bool = ctx.reverse
        of_x, of_weight, of_s, of_r, _, _, _ = ctx.needs_input_grad
        steps, size = len(x), weight.shape[1]
        across = _across(weight.t(), steps, gates[0])
        d_x = torch.empty_like(gates) if of_x else None
        d_weight = torch.zeros_like(weight) if of_weight else None
        d_s = torch.zeros_like(h) if of_s else None
        d_r = torch.zeros_like(gates[0]) if of_r else None
        nothing = torch.zeros_like(h)  # there is no output before the first step
        d_h, d_c = grad[0 if reverse else -1].clone(), grad_last.clone()
        of_ifg_by_c = d_c.unsqueeze(1)
        for block in _blocks(steps, gates[0], reverse):
            old_h, old_c = _before(output, block, h, reverse), _before(cells, block, c, reverse)
            slopes = torch.empty_like(gates[block]) if d_x is None else d_x[block]
            tanh_slopes = _slopes(gates[block], old_c, output[block], us[block], slopes)
            by_c, by_h = slopes.unflatten(-1, (4, size)).split([3, 1], 2)
            forget, back = gates[block].chunk(4, -1)[1], torch.empty_like(slopes)
            grads = _before(grad, block, nothing, reverse)
            tensors = (grads, old_h, tanh_slopes, by_c, by_h.squeeze(2), forget, slopes, back)
            # Views, made at once: to index takes longer than to multiply.
            of_steps = list(zip(*(t.unbind() for t in tensors), strict=True))
            for earlier, old, of_c, of_ifg, of_o, f, slope, scaled in of_steps if reverse else reversed(of_steps):
                d_c.addcmul_(d_h, of_c)
                of_ifg *= of_ifg_by_c
                of_o *= d_h
                d_c *= f
                torch.mul(slope, r, out=scaled)
                d_scaled = across(scaled)
                if d_r is not None:
                    d_r.addcmul_(slope, products.pop())  # in the order in which they were computed
                if d_s is not None:
                    d_s.addcmul_(d_scaled, old)
                d_h = torch.add(earlier, d_scaled) if s is None else torch.addcmul(earlier, d_scaled, s, out=d_h)
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


def _slopes(gates: Tensor, old: Tensor, h: Tensor, u: Tensor, out: Tensor) -> Tensor:
    """Writes the derivatives of c by i, f and g before the sigmoid, and of h by o; gives those of h by c."""
    i, f, q, o = gates.chunk(4, -1)
    d_i, d_f, d_g, d_o = out.chunk(4, -1)
    torch.addcmul(i, i, q, value=-2, out=d_i)  # i ∘ g
    torch.sub(d_i, i, out=d_g)  # −2 i ∘ q
    d_g.addcmul_(d_g, q, value=-1)
    d_i.addcmul_(d_i, i, value=-1)
    torch.ops.aten.sigmoid_backward.grad_input(old, f, grad_input=d_f)
    torch.addcmul(h, h, o, value=-1, out=d_o)
    return torch.ops.aten.sigmoid_backward(o, u).mul_(4)


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
