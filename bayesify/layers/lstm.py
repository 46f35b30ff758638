"""oneDNN's kernel for an LSTM, with weights that are packed once for many calls; the same digits as torch's own.

torch packs them anew for every call, and a rank-1 layer folds its factors into them before that. Posterior means come
again in the next call, so there both are kept for all members, as long as that takes little memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesify.layers.made import made_of_parameters
from bayesify.layers.matmul import is_plain

Packed = list[tuple[Tensor, ...]]
"""Of each layer and direction: both weights and both biases."""
KEPT_BYTES = 64 << 20
"""Most that the weights of all members of a layer may take, kept beside the one copy that they share."""
_LSTM = 2
"""torch's number of the kind of recurrence."""


def fits(layer: nn.LSTM, x: Any, hx: Any) -> bool:
    """Whether the kernel computes what `layer` does of x and a state, or none."""
    if not isinstance(x, Tensor) or x.dim() != 3 or not x.numel() or layer.proj_size:
        return False
    states = () if hx is None else hx
    if not isinstance(states, (tuple, list)):  # torch's error says what was expected
        return False
    onednn = torch.backends.mkldnn
    return onednn.is_available() and bool(onednn.enabled) and is_plain(x, *states, *_weights(layer))


def pack(layer: nn.LSTM) -> Packed:
    """The weights as oneDNN wants them."""
    return [_pack(layer, number, *weights) for number, weights in enumerate(layer.all_weights)]


def _pack(layer: nn.LSTM, number: int, ih: Tensor, hh: Tensor, *biases: Tensor) -> tuple[Tensor, ...]:
    backward = layer.bidirectional and number % 2 == 1
    reorder = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight
    both = reorder(ih.detach(), hh.detach(), layer.hidden_size, backward, True, False, None)
    return *both, *(bias.detach() for bias in biases or [ih.new_zeros(len(ih))] * 2)


def run(layer: nn.LSTM, packed: Packed, input: Tensor, hx: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `layer` gives, with these weights in place of its own."""
    x = (input.transpose(0, 1) if layer.batch_first else input).contiguous()
    if hx is None:
        zeros = x.new_zeros(len(packed), x.shape[1], layer.hidden_size)
        hx = (zeros, zeros)
    layer.check_forward_args(input, hx, None)
    h, c, finals = *hx, []
    directions = 2 if layer.bidirectional else 1
    outputs: list[Tensor] = []
    for number, weights in enumerate(packed):
        backward = number % directions == 1
        options = (backward, [], _LSTM, layer.hidden_size, 1, True, False, False, False)
        y, *state, _ = torch.mkldnn_rnn_layer(x, *weights, h[number], c[number], *options)  # type: ignore[call-arg]
        finals.append(state)
        outputs.append(y)
        if len(outputs) == directions:
            x, outputs = torch.cat(outputs, -1) if directions == 2 else y, []
    final_h, final_c = (torch.stack(parts) for parts in zip(*finals, strict=True))
    return (x.transpose(0, 1) if layer.batch_first else x), (final_h, final_c)


class Kept:
    """Packed weights of the draws of one layer, found again by the factors that were folded into them."""

    def __init__(self) -> None:
        self._products = torch.empty(0)
        self.packed: dict[bytes, Packed] = {}

    def of(self, products: Tensor, draws: Tensor, most: int, pack_draw: Callable[[int], Packed]) -> list[Packed]:
        """The weights for each of the draws [R, ...], packed if they are not there; the last ones are kept.

        Args:
            products: of the weights; where they are others than before, all is packed anew.
        """
        if not torch.equal(products, self._products):
            self._products, self.packed = products, {}
        packed: list[Packed] = []
        for row, draw in enumerate(draws.numpy()):
            key = draw.tobytes()
            self.packed[key] = self.packed.pop(key, None) or pack_draw(row)  # now the last
            packed.append(self.packed[key])
        while len(self.packed) > most:
            self.packed.pop(next(iter(self.packed)))
        return packed


def kept(layer: nn.LSTM, draws: Tensor, members: int, pack_draw: Callable[[int], Packed]) -> list[Packed] | None:
    """The packed weights for draws that come again, one after the other; `None` where they take too much memory.

    Args:
        draws: [R, ...] whatever is folded into the weights.
        members: K; the weights of as many are kept.
        pack_draw: folds and packs the weights of the draw of that row.
    """
    weights = _weights(layer)
    if members * sum(weight.numel() * weight.element_size() for weight in weights) > KEPT_BYTES:
        return None
    # Changes through `.data`, as by averages of weights, leave no trace but in the values.
    return made_of_parameters(layer, Kept).of(_products(weights), draws, members, pack_draw)


def _weights(layer: nn.LSTM) -> list[Tensor]:
    return layer._flat_weights  # type: ignore[return-value]


def _products(weights: list[Tensor]) -> Tensor:
    """Biases, and of each weight the product with a vector: whatever has changed beyond rounding, has changed that.

    To compare all elements takes six times as long.
    """
    return torch.cat([w if w.dim() == 1 else torch.mv(w, torch.linspace(1, 2, w.shape[1])) for w in weights])
