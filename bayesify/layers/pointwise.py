"""Maps that mix few channels at many positions, with a weight for each row: y = W (s ∘ x) ∘ r + b.

Such a weight is small beside its row, so factors are folded into it: the passes over inputs and outputs are gone, and
nothing is kept for the gradients but x. BLAS does not mind a weight for each row. Convolutions of 1 x 1 gain twice:
oneDNN, in which torch computes them on a CPU, lays images out anew before and after each, which with few channels may
take longer than the arithmetic.

Legend: N rows, i channels in, o out, p positions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bayesify.layers import by_row
from bayesify.layers.maps import Convolution, Dense, Map
from bayesify.layers.matmul import has_wider_onednn

CHANNELS = 128
"""i · o / (i + o), multiplications for each element in or out, up to which memory bounds a convolution."""
CHANNELS_OF_FACTORS = 80
"""The same for gradients of factors alone, which are had from those of the weights."""
POSITIONS = 4
"""How many times the elements of a weight a row has at least, in and out."""
LARGE_BYTES = 16 << 20
"""Size of images, in and out, from which laying them out anew needs memory that is had from the system each time."""


def is_pointwise(
    x: Tensor, weight: Tensor, linear: Map, single: bool, s: Tensor | None = None, r: Tensor | None = None
) -> bool:
    """Whether a map of x [N, i, ...], or of [N, ..., i] if it is dense, is faster with a weight for each row.

    Args:
        single: whether all rows share one weight, so that there are no passes to be saved.
        s, r: of the shapes that broadcast with x and y.
    """
    (outputs, inputs, *_), elements = weight.shape, x.numel()
    sides = inputs + outputs
    if not elements or POSITIONS * weight.numel() > sides * (elements // (x.shape[0] * inputs)):
        return False
    if x.device.type != "cpu" or x.element_size() < 4 or not x.is_contiguous():
        return False
    factors_alone = torch.is_grad_enabled() and not weight.requires_grad
    if isinstance(linear, Convolution):
        if x.dim() != weight.dim() or not linear.is_one_by_one(weight):
            return False
        if weight.numel() > sides * (CHANNELS_OF_FACTORS if factors_alone else CHANNELS):
            return False
        if single and sides * elements // inputs * x.element_size() < LARGE_BYTES:
            return False
    elif isinstance(linear, Dense):
        # Where oneDNN is wider than BLAS, so is the product with one weight for all rows.
        if single or x.dim() < 3 or has_wider_onednn() or (s is None and r is None):
            return False
        if not (_is_of_rows(s) and _is_of_rows(r)) or (factors_alone and weight.numel() > sides * CHANNELS_OF_FACTORS):
            return False
    else:
        return False
    return True


def _is_of_rows(vector: Tensor | None) -> bool:
    """Whether a factor is the same at all positions of a row."""
    return vector is None or vector.numel() == len(vector) * vector.shape[-1]


def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor | None, r: Tensor | None, linear: Map
) -> Tensor:
    """y for x and weight as above, and vectors that broadcast with x and y."""
    s, r = (None if v is None else v.flatten(1) for v in (s, r))
    return cast(Tensor, _Pointwise.apply(x, weight.flatten(1), bias, s, r, isinstance(linear, Convolution)))


class _Pointwise(torch.autograd.Function):
    """Saved: x and the factors. Folding the weights once more costs less than keeping them."""

    @staticmethod
    def forward(ctx: Any, *tensors_and_order: Any) -> Tensor:  # type: ignore[override]
        x, weight, bias, s, r, ctx.channels_first = tensors_and_order
        ctx.save_for_backward(x, weight, bias, s, r)
        weights = by_row.folded(weight, s, r).expand(len(x), -1, -1)
        if ctx.channels_first:
            y = x.new_empty(len(x), len(weight), *x.shape[2:])
            torch.bmm(weights, x.flatten(2), out=y.flatten(2))
        else:
            y = x.new_empty(*x.shape[:-1], len(weight))
            torch.bmm(x.flatten(1, -2), weights.mT, out=y.flatten(1, -2))
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, s, r = ctx.saved_tensors
        of_x, of_weight, of_bias, of_s, of_r, _ = ctx.needs_input_grad
        rows, g = ((t.flatten(2).mT if ctx.channels_first else t.flatten(1, -2)) for t in (x, grad))  # [N, p, ...]
        d_x, of_weights = None, (None, None, None)
        if of_x:
            weights = by_row.folded(weight, s, r).expand(len(x), -1, -1)
            d_x = torch.bmm(weights.mT, g.mT) if ctx.channels_first else torch.bmm(g, weights)
            d_x = d_x.view(x.shape)
        if of_weight or of_s or of_r:
            of_weights = by_row.gradients(torch.bmm(g.mT, rows), weight, s, r, (of_weight, of_s, of_r))
        d_weight, d_s, d_r = of_weights
        return d_x, d_weight, grad.sum_to_size(bias.shape) if of_bias else None, d_s, d_r, None
