"""A site: the two factors of one linear map, and what they do to its inputs and outputs.

Legend: R rows of the draw, N rows of the activation (a multiple of R), d channels. Activations are written [N, ...];
the rows may lie in another dimension, `batch_dim`, as in networks that work on [time, batch, channels].
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from bayesify.distributions import Factor
from bayesify.errors import DataError, RowsError
from bayesify.layers.maps import Map
from bayesify.layers.members import MemberVector
from bayesify.layers.product import product


class _Taken(threading.local):
    """The tokens [n] that were last taken out of how many, inside a module that hands tokens on."""

    tokens: tuple[Tensor, int] | None = None


TAKEN = _Taken()
_ALL = slice(None)


class Site(nn.Module):
    """Factors s [K, in] and r [K, out] of one linear map; either may be absent and then changes nothing.

    `own_bias` is what each member adds to the shared bias, where members have biases of their own. `batch_dim` is the
    dimension of the activations that carries the batch.
    """

    def __init__(
        self, s: Factor | None, r: Factor | None, own_bias: MemberVector | None = None, batch_dim: int = 0
    ) -> None:
        super().__init__()
        self.s = s
        self.r = r
        self.own_bias = own_bias
        self.batch_dim = batch_dim

    # ---------------------------------------------------------------------------- the perturbation, row by row

    def enter(self, x: Tensor, s: Tensor) -> Tensor:
        """What the linear map is given, for x and s that broadcast."""
        return x * s

    def leave(self, y: Tensor, r: Tensor, bias: Tensor | None) -> Tensor:
        """What comes out, for y = W (…) without its bias."""
        return y * r if bias is None else torch.addcmul(bias.to(y.dtype), y, r)

    def releave(self, y: Tensor, r: Tensor, bias: Tensor | None) -> Tensor:
        """The same for y that contains its bias already: r ∘ L(s ∘ x) + (1 − r) ∘ b, exact at r = 1."""
        return y * r if bias is None else torch.addcmul(y * r, 1 - r, bias.to(y.dtype))

    def note(self, x: Tensor) -> None:
        """Called with what a product in a module's own code is about to get."""

    # ---------------------------------------------------------------------------- with the draw in force

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, linear: Map, dim: int = -1, part: slice = _ALL
    ) -> Tensor:
        """The whole map, for x [N, ...] with its channels in dimension `dim`; `part` of the outputs, if not all."""
        s, r, along, single, least = None, None, None, True, None
        # Each part is looked up once: with few rows, what Python does costs as much as the arithmetic.
        of_s, of_r = self.s, self.r
        if of_s is not None:
            draw = of_s.value()
            check_channels(x, dim, draw.shape[1])
            s, single = self._rows(draw, x, dim), draw.shape[0] == 1
        if of_r is not None:
            draw = of_r.value()
            single = single and draw.shape[0] == 1
            r = self._rows(draw if part == _ALL else draw[:, part], x, dim)
            least = None if torch.compiler.is_compiling() else of_r.least
        if bias is not None:
            along, own_bias = _along(bias, x, dim), self.own_bias
            if own_bias is not None:
                along = along + self._rows(own_bias.value()[:, part], x, dim)
        y = product(x, weight, along, s, r, linear, single, least)
        if y is None:
            y = linear(self.scale_inputs(x, dim), weight)
            y = self.scale_outputs(y, bias, dim, part)
        return y

    def scale_inputs(self, x: Tensor, dim: int = -1) -> Tensor:
        """The perturbed inputs, with the channels of x [N, ...] in dimension `dim`."""
        if self.s is None:
            return x
        draw = self.s.value()
        check_channels(x, dim, draw.shape[1])
        return self.enter(x, self._rows(draw, x, dim))

    def scale_outputs(self, y: Tensor, bias: Tensor | None, dim: int = -1, part: slice = _ALL) -> Tensor:
        """The perturbed outputs for y [N, ...] = W (…) without its bias, which is added; or a part of the outputs."""
        if bias is not None:
            bias = _along(bias.to(y.dtype), y, dim)
            if self.own_bias is not None:
                bias = bias + self._rows(self.own_bias.value()[:, part], y, dim)
        if self.r is None:
            return y if bias is None else y + bias
        return self.leave(y, self._rows(self.r.value()[:, part], y, dim), bias)

    def rescale_outputs(self, y: Tensor, bias: Tensor | None, dim: int = -1) -> Tensor:
        """The same for y [N, ...] that contains its bias already."""
        if self.r is not None:
            along = None if bias is None else _along(bias.to(y.dtype), y, dim)
            y = self.releave(y, self._rows(self.r.value(), y, dim), along)
        return y if self.own_bias is None else y + self._rows(self.own_bias.value(), y, dim)

    def _rows(self, draw: Tensor, x: Tensor, dim: int) -> Tensor:
        return rows_of(draw, x, dim, self.batch_dim)

    # ---------------------------------------------------------------------------- one row of the draw

    def vectors(self, row: int) -> tuple[Tensor | None, Tensor | None]:
        """One row of the draws: s [in] and r [out], float32."""
        s, r = (None if factor is None else factor.value()[row] for factor in (self.s, self.r))
        return s, r

    def own_bias_of(self, row: int) -> Tensor | None:
        """[out] the own bias of the member that row `row` of the draws belongs to."""
        if self.own_bias is None:
            return None
        value = self.own_bias.value()
        return value[row * value.shape[0] // self.rows]

    @property
    def rows(self) -> int:
        """R, the number of rows of the draw in force."""
        factor = self.s if self.s is not None else self.r
        return 1 if factor is None else factor.value().shape[0]

    @property
    def members(self) -> int:
        factor = self.s if self.s is not None else self.r
        return 1 if factor is None else factor.members


class AdditiveSite(Site):
    """y = W (x + s) + r + b: the variant with added vectors."""

    def enter(self, x: Tensor, s: Tensor) -> Tensor:
        return x + s

    def leave(self, y: Tensor, r: Tensor, bias: Tensor | None) -> Tensor:
        return y + r if bias is None else y + r + bias.to(y.dtype)

    def releave(self, y: Tensor, r: Tensor, bias: Tensor | None) -> Tensor:
        return y + r

    def product(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, linear: Map, dim: int = -1, part: slice = _ALL
    ) -> Tensor:
        return self.scale_outputs(linear(self.scale_inputs(x, dim), weight), bias, dim, part)


def repeat_rows(draw: Tensor, rows: int) -> Tensor:
    """Repeat a draw [R, d] to [rows, d]: neighboring rows share, so all windows of one example share one draw.

    Rows that are tokens taken from all over get the draw of where they come from.
    """
    drawn = draw.shape[0]
    taken = TAKEN.tokens
    if taken is not None and drawn > 1 and len(taken[0]) == rows:
        return draw.index_select(0, taken[0] * drawn // taken[1])
    if drawn in (1, rows):
        return draw
    if rows % drawn:
        raise RowsError(
            f"a rank-1 layer got {rows} rows, which is no multiple of the {drawn} rows of its factors. Call the "
            "BayesianModel, not the network inside it; if you do, this layer's input does not carry the batch in "
            "its first dimension: leave the layer out with exclude=."
        )
    return draw[:, None].expand(drawn, rows // drawn, draw.shape[1]).reshape(rows, draw.shape[1])


def rows_of(draw: Tensor, x: Tensor, dim: int, batch_dim: int = 0) -> Tensor:
    """A draw [R, d] shaped to combine with x, whose d channels and N rows are in two dimensions, in the dtype of x."""
    draw = repeat_rows(draw, x.shape[batch_dim])
    draw = draw if draw.dtype == x.dtype else draw.to(x.dtype)
    shape = [1] * x.dim()
    shape[batch_dim], shape[dim] = draw.shape
    return (draw if batch_dim <= dim % x.dim() else draw.t()).view(shape)


def check_channels(x: Tensor, dim: int, channels: int) -> None:
    """Raise `DataError` for an input of another size: a single channel would be multiplied by every element of s."""
    if x.shape[dim] != channels:
        raise DataError(
            f"a rank-1 layer got an input of shape {tuple(x.shape)}; expected {channels} channels in dimension "
            f"{dim % x.dim()}."
        )


def _along(vector: Tensor, x: Tensor, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return vector.view(shape)
