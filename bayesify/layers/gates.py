"""The gates of recurrent cells: the arithmetic of a step, and the products that go into it with their factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify.layers.registry import bias_of
from bayesify.layers.site import Site, repeat_rows


def _lstm(gx: Tensor, gh: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(gx: Tensor, gh: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, -1), gh.chunk(3, -1)
    z = (xz + hz).sigmoid()
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + z * (state[0] - n),)


def _tanh(gx: Tensor, gh: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((gx + gh).tanh(),)


def _relu(gx: Tensor, gh: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return ((gx + gh).relu(),)


def step_of(layer: nn.Module) -> Callable[[Tensor, Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The arithmetic after the gate kernels: gates from x, gates from h, old state -> new state (h first)."""
    if isinstance(layer, (nn.LSTM, nn.LSTMCell)):
        return _lstm
    if isinstance(layer, (nn.GRU, nn.GRUCell)):
        return _gru
    return _tanh if layer.nonlinearity == "tanh" else _relu


class GateKernel:
    """One gate kernel with its draw repeated to the rows of the batch (in the order of a packed sequence)."""

    def __init__(self, layer: Any, name: str, rows: int, order: Tensor | None, dtype: torch.dtype) -> None:
        self.site: Site = layer.rank1[name]  # type: ignore[assignment]
        self.weight: Tensor = getattr(layer, name)
        self.bias: Tensor | None = getattr(layer, bias_of(name), None)
        parts = (self.site.s, self.site.r, self.site.own_bias)
        vectors = [None if part is None else repeat_rows(part.value(), rows).to(dtype) for part in parts]
        # A draw of one row broadcasts; any other follows the order in which the packed sequence holds its rows.
        self.s, self.r, own_bias = (
            v if v is None or order is None or v.shape[0] == 1 else v.index_select(0, order) for v in vectors
        )
        if self.bias is not None:
            self.bias = self.bias.unsqueeze(0) if own_bias is None else self.bias + own_bias

    def __call__(self, x: Tensor, index: Tensor | slice) -> Tensor:
        """The perturbed map of x [n, in], with the rows of the draw given by `index`."""
        s, r, bias = (v if v is None or v.shape[0] == 1 else v[index] for v in (self.s, self.r, self.bias))
        y = F.linear(x if s is None else self.site.enter(x, s), self.weight)
        if r is None:
            return y if bias is None else y + bias
        return self.site.leave(y, r, bias)
