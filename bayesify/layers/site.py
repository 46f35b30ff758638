"""A site: the two factors of one linear map, and the two multiplications they make.

Legend: R rows of the draw, N rows of the activation (a multiple of R), d channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bayesify.distributions import Factor
from bayesify.errors import BayesifyError


class Site(nn.Module):
    """Factors s [K, in] and r [K, out] of one linear map; either may be absent and then stands at 1."""

    def __init__(self, s: Factor | None, r: Factor | None) -> None:
        super().__init__()
        self.s = s
        self.r = r

    def scale_inputs(self, x: Tensor, dim: int = -1) -> Tensor:
        """s ∘ x, with the channels of x [N, ...] in dimension `dim`."""
        return x if self.s is None else x * rows_of(self.s.value(), x, dim)

    def scale_outputs(self, y: Tensor, bias: Tensor | None, dim: int = -1) -> Tensor:
        """r ∘ y + b for y [N, ...] = W (s ∘ x) without its bias."""
        if bias is not None:
            bias = _along(bias.to(y.dtype), y, dim)
        if self.r is None:
            return y if bias is None else y + bias
        r = rows_of(self.r.value(), y, dim)
        return y * r if bias is None else torch.addcmul(bias, y, r)

    def rescale_outputs(self, y: Tensor, bias: Tensor | None, dim: int = -1) -> Tensor:
        """r ∘ y + (1 − r) ∘ b for y [N, ...] that already contains its bias: r ∘ L(s ∘ x) + b, exact at r = 1."""
        if self.r is None:
            return y
        r = rows_of(self.r.value(), y, dim)
        return y * r if bias is None else torch.addcmul(y * r, 1 - r, _along(bias.to(y.dtype), y, dim))

    def vectors(self, row: int) -> tuple[Tensor | None, Tensor | None]:
        """One row of the draws: s [in] and r [out], float32."""
        return (
            None if self.s is None else self.s.value()[row],
            None if self.r is None else self.r.value()[row],
        )

    @property
    def rows(self) -> int:
        """R, the number of rows of the draw in force."""
        factor = self.s if self.s is not None else self.r
        return 1 if factor is None else factor.value().shape[0]

    @property
    def members(self) -> int:
        factor = self.s if self.s is not None else self.r
        return 1 if factor is None else factor.members


def repeat_rows(draw: Tensor, rows: int) -> Tensor:
    """Repeat a draw [R, d] to [rows, d]: neighboring rows share, so all windows of one example share one draw."""
    drawn = draw.shape[0]
    if drawn in (1, rows):
        return draw
    if rows % drawn:
        raise BayesifyError(
            f"a rank-1 layer got {rows} rows, which is no multiple of the {drawn} rows of its factors. Call the "
            "BayesianModel, not the network inside it; if you do, this layer's input does not carry the batch in "
            "its first dimension: leave the layer out with exclude=."
        )
    return draw[:, None].expand(drawn, rows // drawn, draw.shape[1]).reshape(rows, draw.shape[1])


def rows_of(draw: Tensor, x: Tensor, dim: int) -> Tensor:
    """A draw [R, d] shaped to multiply x [N, ...] with its d channels in dimension `dim`, in the dtype of x."""
    draw = repeat_rows(draw, x.shape[0]).to(x.dtype)
    shape = [1] * x.dim()
    shape[0], shape[dim] = draw.shape
    return draw.view(shape)


def _along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return vector.view(shape)
