"""The product of a site, y = r ∘ W (s ∘ x) + b, as cheaply as memory allows.

Multiplications are bound by memory: a fresh tensor of a hundred megabytes costs more than the arithmetic in it. So
rows are taken in chunks whose perturbed inputs and outputs stay in the cache, what is fresh is changed in place, and
training keeps no more than the plain layer does. For that, the gradient of r is had from the layer's own output
z = r ∘ y + b, which the next layer keeps anyway, and not from y: Σ g ∘ y = (Σ g ∘ z − b Σ g) / r.

Legend: N rows in the first dimension; s, r and b come shaped to broadcast with x [N, ...] and y [N, ...].
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesify.cost import costs
from bayesify.layers import by_row
from bayesify.layers.maps import Convolution, Map
from bayesify.layers.pointwise import is_pointwise, pointwise

CHUNK_BYTES = 8 << 20
"""Size of what a chunk of rows makes on the way: within the cache that cores share. Half of it takes more time in calls
than the cache saves, twice as much a tenth more memory in a training step."""
SMALLEST_DIVISOR = 1e-5
"""Where |r| is smaller, dividing by it would lose the gradient of r, and y is computed anew; see also below."""
LARGE_ROW_BYTES = 256 << 10
"""Size of a row, in and out, from which a call for each costs little beside its arithmetic."""
_ALL = slice(None)
"""Rows that are one chunk, and need not be sliced: with few of them that would take longer than to multiply."""


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    r: Tensor | None,
    linear: Map,
    single: bool,
    least: Callable[[], float] | None = None,
) -> Tensor | None:
    """y = r ∘ W (s ∘ x) + b; `None` where it is to be computed operation by operation.

    That is: under a compiler, which has fusion of its own; under function transforms; and for weights that are no plain
    tensors, such as those in low bits.

    Args:
        single: whether all rows share one draw, which may then be folded into the weight.
        least: gives a size that no element of r falls below, if any is known.
    """
    plain = type(weight) in (Tensor, nn.Parameter) and type(x) in (Tensor, nn.Parameter)
    if torch.compiler.is_compiling() or not plain or torch._C._are_functorch_transforms_active():
        return None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias, s, r = (None if t is None else t.to(dtype) for t in (x, weight, bias, s, r))  # type: ignore[assignment]
        with torch.autocast(x.device.type, enabled=False):
            return product(x, weight, bias, s, r, linear, single, least)
    if isinstance(linear, Convolution) and linear.is_depthwise(x, weight) and s is not None:
        s, r, least = None, s if r is None else s * r, None  # channels stay apart: one pass instead of two
    if is_pointwise(x, weight, linear, single, s, r):
        return pointwise(x, weight, bias, s, r, linear)
    tensors = (x, weight, bias, s, r)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return cast(Tensor, _Product.apply(*tensors, linear, single, least))
    return _forward(x, weight, bias, s, r, linear, single)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    s: Tensor | None,
    r: Tensor | None,
    linear: Map,
    single: bool,
) -> Tensor:
    if single and _smaller_weight(x, weight, s, r, linear):
        s, r, bias = (None if t is None else t.flatten() for t in (s, r, bias))
        return linear(x, linear.folded(weight, s, r, scratch([weight])[0]), bias)
    chunks = _chunks(x, weight, linear)
    if len(chunks) == 1:
        y = linear(_times(x, s), weight)
        return _finish(y, r, bias, y)
    out, laid_out = None, linear.laid_out(weight, x[chunks[0]], len(chunks))
    for rows in chunks:
        y = linear(_times(x[rows], _part(s, rows)), laid_out)
        if out is None:
            out = _empty_rows(len(x), y)
        _finish(y, _part(r, rows), _part(bias, rows), out[rows])
    return cast(Tensor, out)


def _smaller_weight(x: Tensor, weight: Tensor, s: Tensor | None, r: Tensor | None, linear: Map) -> bool:
    """Whether multiplying the weight costs less than multiplying what the layer gets and gives."""
    sides = (s is not None) * x.numel() + (r is not None) * x.numel() * linear.growth(weight)
    return costs().folds(weight.numel(), sides)


def _finish(y: Tensor, r: Tensor | None, bias: Tensor | None, out: Tensor) -> Tensor:
    """r ∘ y + b, written to `out`, which may be y."""
    if r is not None:
        return torch.mul(y, r, out=out) if bias is None else torch.addcmul(bias, y, r, out=out)
    if bias is not None:
        return torch.add(y, bias, out=out)
    return y if out is y else out.copy_(y)


def _has_small(r: Tensor, limit: float, least: Callable[[], float] | None) -> bool:
    """Whether r has an element that is smaller; on a GPU, to look is to wait, and done where `least` does not tell."""
    return (least is None or not least() >= limit) and _looked_at(r, limit)


def _looked_at(r: Tensor, limit: float) -> bool:
    return bool((r.abs() < limit).any())


def _smallest_divisor(dtype: torch.dtype) -> float:
    """Half precision rounds r ∘ y + b before it is divided by r: at 8 ε the gradient is off by a few percent."""
    return max(SMALLEST_DIVISOR, 8 * torch.finfo(dtype).eps)


class _Product(torch.autograd.Function):
    """The product with gradients. Saved: what the plain layer saves, and the output, which is not copied."""

    @staticmethod
    def forward(ctx: Any, *tensors_and_map: Any) -> Tensor:  # type: ignore[override]
        x, weight, bias, s, r, linear, single, ctx.least = tensors_and_map
        out = _forward(x, weight, bias, s, r, linear, single)
        ctx.linear = linear
        ctx.save_for_backward(x, weight, bias, s, r)
        # Not saved as the others are: the next layer may change it in place, as ReLU does, and then y is computed anew;
        # and not at all where saving is somebody else's business, such as that of gradient checkpointing.
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[attr-defined]
        ctx.out = out.detach() if r is not None and ctx.needs_input_grad[4] and not hooked else None
        ctx.version = out._version
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, s, r = ctx.saved_tensors
        of_x, of_weight, of_bias, of_s, of_r, *_ = ctx.needs_input_grad
        out, ctx.out = ctx.out, None
        differentiable = torch.is_grad_enabled()
        if of_s and not (of_x or differentiable) and _is_first(x, weight, grad, ctx.linear):
            return _of_first(ctx, grad)
        if out is not None and (out._version != ctx.version or _has_small(r, _smallest_divisor(out.dtype), ctx.least)):
            out = None
        by_output = of_r and out is not None and not differentiable
        # Σ g (out − b) as Σ g out − b Σ g costs no pass over the rows, but digits that half precision does not have.
        at_once = by_output and bias is not None and cast(Tensor, out).element_size() > 2
        d_bias, d_s, d_r, sums = (_Gradient() for _ in range(4))
        d_x: Tensor | None = None
        d_weight: Tensor | None = None
        chunks = [_ALL] if differentiable else _chunks(x, weight, ctx.linear)
        again = of_r and not by_output
        forth = ctx.linear.laid_out(weight, _part(x, chunks[0]), len(chunks)) if again else weight
        first = _part(grad, chunks[0])
        back = ctx.linear.laid_out(weight, first, len(chunks), backward=True) if of_x or of_s else None
        for rows in chunks:
            g, part, of_part, of_out = (_part(t, rows) for t in (grad, x, s, r))
            scaled = _times(part, of_part) if of_weight or again else part
            if of_bias or at_once:
                total = _sum_like(g, bias if r is None or (bias is not None and bias.numel() > r.numel()) else r, rows)
                if of_bias:
                    d_bias.add(_sum_like(total, bias, rows), bias)
                if at_once:
                    sums.add(_sum_like(total, r, rows), r)
            if of_r:
                other = ctx.linear(scaled, forth) if again else _part(out, rows)
                if by_output and bias is not None and not at_once:
                    other = other - _part(bias, rows)
                d_r.add(_sum_like(g * other, r, rows), r)
            if not (of_x or of_weight or of_s):
                continue
            d_scaled, d_weight = ctx.linear.gradients(_times(g, of_out), scaled, weight, back, of_weight, d_weight)
            if of_s:
                d_s.add(_sum_like(d_scaled * part, s, rows), s)
            if of_x and differentiable:
                d_x = _times(d_scaled, of_part)
            elif of_x and len(chunks) == 1:
                d_x = _finish(d_scaled, s, None, d_scaled)
            elif of_x:
                d_x = _empty_rows(len(x), d_scaled) if d_x is None else d_x
                _finish(d_scaled, of_part, None, d_x[rows])
        of_r_sum = d_r.value()
        if by_output and of_r_sum is not None:
            if at_once:
                of_r_sum = of_r_sum - cast(Tensor, bias) * cast(Tensor, sums.value())
            of_r_sum = of_r_sum / cast(Tensor, r)
        return d_x, d_weight, d_bias.value(), d_s.value(), of_r_sum, None, None, None


def _is_first(x: Tensor, weight: Tensor, grad: Tensor, linear: Map) -> bool:
    """Whether this is a convolution of large images by a small weight, so that `_of_first` costs less."""
    if not isinstance(linear, Convolution) or linear.groups != 1 or linear.transposed:
        return False
    if x.device.type != "cpu" or x.element_size() < 4:  # sums over rows would round in half precision
        return False
    row = (x.numel() + grad.numel()) // max(len(x), 1)
    return row * x.element_size() >= LARGE_ROW_BYTES and weight.numel() <= 2 * row


def _of_first(ctx: Any, grad: Tensor) -> Any:
    """Gradients where none of x is wanted, from those of the weights of rows, one after the other: in place of
    gradients of x, which with few channels cost several times as much, and of passes over the rows."""
    x, weight, bias, s, r = ctx.saved_tensors
    _, of_weight, of_bias, of_s, of_r, *_ = ctx.needs_input_grad
    matrix, taps = weight.flatten(1), weight[0, 0].numel()
    for_taps, of_outputs = s.flatten(1).repeat_interleave(taps, 1), None if r is None else r.flatten(1)
    d_weight, d_s, d_r = (_Gradient() for _ in range(3))
    for n in range(len(x)):
        row = slice(n, n + 1)
        _, of_row = ctx.linear.gradients(grad[row], x[row], weight, None, True, None)
        of_row = cast(Tensor, of_row).flatten(1).unsqueeze(0)
        factors = _part(for_taps, row), _part(of_outputs, row)
        of_matrix, of_own_s, of_own_r = by_row.gradients(of_row, matrix, *factors, (of_weight, of_s, of_r))
        d_weight.add(of_matrix, weight[:1])
        d_s.add(cast(Tensor, of_own_s).unflatten(1, (-1, taps)).sum(2), s)
        d_r.add(of_own_r, r)
    d_bias = _sum_like(grad, bias, _ALL) if of_bias else None
    of_weight, of_s, of_r = (
        None if (total := d.value()) is None else total.view_as(v)
        for d, v in ((d_weight, weight), (d_s, s), (d_r, cast(Tensor, r)))
    )
    return None, of_weight, d_bias, of_s, of_r, None, None, None


class _Gradient:
    """A gradient of a vector that is put together from chunks of rows: side by side, or summed where rows share it."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, part: Tensor | None, like: Tensor | None) -> None:
        if part is None:
            return
        if self.parts and len(cast(Tensor, like)) == 1:
            self.parts[0] = self.parts[0] + part
        else:
            self.parts.append(part)

    def value(self) -> Tensor | None:
        if not self.parts:
            return None
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)


# ------------------------------------------------------------------------------------------------ rows


def _chunks(x: Tensor, weight: Tensor, linear: Map) -> list[slice]:
    """Rows that are computed at once: all, or as many as make temporary tensors of about CHUNK_BYTES, and about twice
    the bytes of the weight, which every chunk reads."""
    total = x.shape[0]
    size = x.element_size() * x.numel() * max(1.0, linear.growth(weight))
    limit = max(CHUNK_BYTES, 2 * _weight_bytes(weight))
    if size <= 1.5 * limit or x.device.type != "cpu" or x.dim() < 2:
        return [_ALL]
    count = math.ceil(total / round(size / limit))
    return [slice(start, min(start + count, total)) for start in range(0, total, count)]


_THREAD = threading.local()


def scratch(weights: Sequence[Tensor]) -> list[Tensor] | list[None]:
    """Memory for the folded weights of a layer, kept from layer to layer, on a CPU, where a thread is done with one
    before the next: fresh memory costs many times the multiplication."""
    if any(type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu" for weight in weights):
        return [None] * len(weights)
    sizes = [weight.numel() * weight.element_size() for weight in weights]
    lines = [-(-size // 64) * 64 for size in sizes]  # whole cache lines
    kept: Tensor | None = getattr(_THREAD, "memory", None)
    if kept is None or kept.numel() < sum(lines):
        with torch.inference_mode(False):
            _THREAD.memory = kept = torch.empty(sum(lines), dtype=torch.uint8)
    parts = zip(kept[: sum(lines)].split(lines), sizes, weights, strict=True)
    return [part[:size].view(weight.dtype).view(weight.shape) for part, size, weight in parts]


def _weight_bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _part(value: Any, rows: slice) -> Any:
    """Rows of a tensor; of one that all rows share, or of none, itself."""
    return value if value is None or rows is _ALL or value.shape[0] == 1 else value[rows]


def _times(x: Tensor, vector: Tensor | None) -> Tensor:
    return x if vector is None else x * vector


def _sum_like(value: Tensor, like: Tensor | None, rows: slice) -> Tensor:
    return value.sum_to_size(_part(like, rows).shape)


def _empty_rows(rows: int, like: Tensor) -> Tensor:
    """An empty [rows, ...] with the rest of its shape, and its layout in memory, from `like`."""
    shape = (rows, *like.shape[1:])
    last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return like.new_empty(shape).to(memory_format=torch.channels_last) if last else like.new_empty(shape)
