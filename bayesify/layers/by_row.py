"""Linear maps with a weight for each row, W ∘ (r sᵀ): the weights, and what their gradients say of W, s and r.

Legend: N rows, i in, o out.
"""

from __future__ import annotations

from torch import Tensor


def folded(weight: Tensor, s: Tensor | None, r: Tensor | None) -> Tensor:
    """W ∘ (r sᵀ) for W [o, i] or [N, o, i], s [N or 1, i] and r [N or 1, o]."""
    weight = weight if r is None else weight * r.unsqueeze(2)
    return weight if s is None else weight * s.unsqueeze(1)


def gradients(
    of_folded: Tensor, weight: Tensor, s: Tensor | None, r: Tensor | None, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of W, s and r, which of them are wanted, from those of the weights of rows [N, o, i]."""
    of_weight, of_s, of_r = wanted
    product = of_folded * weight if of_s or of_r else of_folded
    d_s = _summed(product.transpose(1, 2), r, s) if of_s and s is not None else None
    d_r = _summed(product, s, r) if of_r and r is not None else None
    return folded(of_folded, s, r).sum(0) if of_weight else None, d_s, d_r


def _summed(product: Tensor, other: Tensor | None, like: Tensor) -> Tensor:
    """[N or 1, a] the sum of [N, a, b] over b, weighted by the other factor [N or 1, b], and over rows that share."""
    total = product.sum(2) if other is None else (product @ other.unsqueeze(2)).squeeze(2)
    return total.sum_to_size(like.shape)
