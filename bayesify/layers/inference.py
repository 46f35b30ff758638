"""Plain layers that compute the same in less time, in inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bayesify.layers.maps import Convolution
from bayesify.layers.matmul import has_wider_onednn, is_plain, linear
from bayesify.layers.pointwise import is_pointwise, pointwise

_ONE_BY_ONE = Convolution([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
_LSTM = 2
"""torch's number of the kind of recurrence."""


def speed_up(network: nn.Module) -> int:
    """Give layers of a network, in place, the classes below; returns how many gain by it on this machine."""
    faster = {module: equivalent for module in network.modules() if (equivalent := _faster(module)) is not None}
    for module, equivalent in faster.items():
        module.__class__ = equivalent
    return sum(equivalent is not WideLinear or has_wider_onednn() for equivalent in faster.values())


def _faster(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.Conv2d:
        return PointwiseConv2d if Convolution.of(module).is_one_by_one(module.weight) else None
    return {nn.Linear: WideLinear, nn.LSTM: PackedLSTM}.get(type(module))


class WideLinear(nn.Linear):
    """A dense layer in the widest instructions of the processor."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class PointwiseConv2d(nn.Conv2d):
    """A convolution of 1 x 1 that is a product of matrices where images are large."""

    def forward(self, input: Tensor) -> Tensor:
        if is_plain(input, self.weight, self.bias) and is_pointwise(input, self.weight, _ONE_BY_ONE, single=True):
            bias = None if self.bias is None else self.bias.view(-1, 1, 1)
            return pointwise(input, self.weight, bias, None, None, _ONE_BY_ONE)
        return super().forward(input)


class PackedLSTM(nn.LSTM):
    """An LSTM whose weights lie as oneDNN's kernel wants them, on a CPU; the same digits as torch's own.

    torch lays them out anew in every call of that kernel, which with few or short sequences takes much of its time.
    Here they are held a second time, from the first call on.
    """

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:  # type: ignore[override]
        if not isinstance(input, Tensor) or not self._fits(input):
            return super().forward(input, hx)
        x = (input.transpose(0, 1) if self.batch_first else input).contiguous()
        if hx is None:
            zeros = x.new_zeros(len(self.all_weights), x.shape[1], self.hidden_size)
            hx = (zeros, zeros)
        self.check_forward_args(input, hx, None)
        h, c, finals = *hx, []
        directions = 2 if self.bidirectional else 1
        outputs: list[Tensor] = []
        for number, weights in enumerate(self._packed()):
            backward = number % directions == 1
            options = (backward, [], _LSTM, self.hidden_size, 1, True, False, False, False)
            y, *state, _ = torch.mkldnn_rnn_layer(x, *weights, h[number], c[number], *options)  # type: ignore[call-arg]
            finals.append(state)
            outputs.append(y)
            if len(outputs) == directions:
                x, outputs = torch.cat(outputs, -1) if directions == 2 else y, []
        final = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
        return (x.transpose(0, 1) if self.batch_first else x), final

    def _fits(self, x: Tensor) -> bool:
        weights = list(self.parameters())
        if not is_plain(x, *weights) or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
            return False
        # Whether inference tensors were changed cannot be told.
        return not self.proj_size and x.dim() == 3 and x.numel() > 0 and not any(w.is_inference() for w in weights)

    def _packed(self) -> list[tuple[Tensor, ...]]:
        """(W_ih, W_hh, b_ih, b_hh) of each layer and direction, as the kernel wants them; packed when they changed."""
        key = [(p.data_ptr(), p._version) for p in self.parameters()]
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != key:
            self.__dict__["_kept"] = kept = key, [self._pack(n, *w) for n, w in enumerate(self.all_weights)]
        return kept[1]

    def _pack(self, number: int, ih: Tensor, hh: Tensor, *biases: Tensor) -> tuple[Tensor, ...]:
        backward = self.bidirectional and number % 2 == 1
        pack = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight
        both = pack(ih.detach(), hh.detach(), self.hidden_size, backward, True, False, None)
        return *both, *(bias.detach() for bias in biases or [ih.new_zeros(len(ih))] * 2)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_kept"}
