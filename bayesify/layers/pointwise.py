"""Convolutions of 1 x 1 that mix few channels of large images, as products of matrices: y = W (s ∘ x) ∘ r + b.

oneDNN, in which torch computes convolutions on a CPU, lays images out anew before and after each. With few channels
that may take longer than the arithmetic. BLAS does not mind a weight for each image, and such a weight is small beside
the image, so factors are folded into it: the passes over images are gone, and nothing is kept for the gradients but x.

Legend: N images, i channels in, o out, p positions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bayesify.layers.maps import Convolution, Map

CHANNELS = 128
"""i · o / (i + o), multiplications for each element in or out, up to which memory bounds the convolution; half of it
for gradients of factors alone, which are had from those of the weights."""
POSITIONS = 4
"""How many times the elements of a weight an image has at least, in and out."""
LARGE_BYTES = 16 << 20
"""Size of images, in and out, from which laying them out anew needs memory that is had from the system each time."""


def is_pointwise(x: Tensor, weight: Tensor, linear: Map, single: bool) -> bool:
    """Whether a map of x [N, i, ...] is such a convolution, and faster this way.

    Args:
        single: whether all images share one weight, so that there are no passes to be saved.
    """
    if not isinstance(linear, Convolution) or x.device.type != "cpu" or x.dim() != weight.dim() or x.element_size() < 4:
        return False
    if not linear.is_one_by_one(weight) or not x.numel() or not x.is_contiguous():
        return False
    outputs, inputs = weight.shape[:2]
    sides = inputs + outputs
    if single and sides * x.numel() // inputs * x.element_size() < LARGE_BYTES:
        return False
    limit = CHANNELS // 2 if torch.is_grad_enabled() and not weight.requires_grad else CHANNELS
    return weight.numel() <= limit * sides and POSITIONS * weight.numel() <= sides * x[0, 0].numel()


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor | None, r: Tensor | None) -> Tensor:
    """y [N, o, ...] for x [N, i, ...], weight [o, i, 1, ...] and vectors that broadcast with x and y."""
    s, r = (None if v is None else v.flatten(1) for v in (s, r))
    y = cast(Tensor, _Pointwise.apply(x.flatten(2), weight.flatten(1), s, r)).unflatten(2, x.shape[2:])
    return y if bias is None else y.add_(bias)


def _folded(weight: Tensor, s: Tensor | None, r: Tensor | None) -> Tensor:
    """W ∘ (r sᵀ), each with or without a dimension for images in front."""
    weight = weight if r is None else weight * r.unsqueeze(2)
    return weight if s is None else weight * s.unsqueeze(1)


class _Pointwise(torch.autograd.Function):
    """Saved: x [N, i, p] and the factors. Folding the weights once more costs less than keeping them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*tensors)
        x, weight, s, r = tensors
        return torch.bmm(_folded(weight, s, r).expand(len(x), -1, -1), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, s, r = ctx.saved_tensors
        of_x, of_weight, of_s, of_r = ctx.needs_input_grad
        d_x = torch.bmm(_folded(weight, s, r).expand(len(x), -1, -1).transpose(1, 2), grad) if of_x else None
        if not (of_weight or of_s or of_r):
            return d_x, None, None, None
        of_folded = torch.bmm(grad, x.transpose(1, 2))
        product = of_folded * weight if of_s or of_r else of_folded
        d_s = _summed(product.transpose(1, 2), r, s) if of_s else None
        d_r = _summed(product, s, r) if of_r else None
        return d_x, _folded(of_folded, s, r).sum(0) if of_weight else None, d_s, d_r


def _summed(product: Tensor, other: Tensor | None, like: Tensor) -> Tensor:
    """[N or 1, a] the sum of [N, a, b] over b, weighted by the other factor [N or 1, b], and over rows that share."""
    total = product.sum(2) if other is None else (product @ other.unsqueeze(2)).squeeze(2)
    return total.sum_to_size(like.shape)
