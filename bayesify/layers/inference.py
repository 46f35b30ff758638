"""Plain layers that compute the same in less time, in inference.

oneDNN and BLAS lay a weight out anew in every call. Beside few rows, such as those of one image in the last stage of a
network, that takes up to half of the time: there weights are held a second time, as oneDNN wants them, from the first
call on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bayesify.layers import lstm
from bayesify.layers.made import made_of_parameters
from bayesify.layers.maps import DENSE, Convolution, Map
from bayesify.layers.matmul import has_onednn, is_plain, linear
from bayesify.layers.pointwise import is_pointwise, pointwise

ROWS = 4
"""From how many rows it pays to have a weight packed; BLAS reads it once for fewer."""
WEIGHT = 1 << 18
"""From how many elements of it."""
SHARE_OF_DENSE, SHARE_OF_CONVOLUTION = 6, 2
"""How many times the elements that go in and out those are at least."""


def speed_up(network: nn.Module) -> int:
    """Give layers of a network, in place, the classes below; returns how many."""
    faster = {module: equivalent for module in network.modules() if (equivalent := _faster(module)) is not None}
    for module, equivalent in faster.items():
        module.__class__ = equivalent
    return len(faster)


def _faster(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.Conv2d:
        return PackedConv2d if module.padding_mode == "zeros" and not isinstance(module.padding, str) else None
    return {nn.Linear: PackedLinear, nn.LSTM: PackedLSTM}.get(type(module))


def _is_for_packed(x: Tensor, weight: Tensor, linear: Map, share: float) -> bool:
    """Whether a map of x [N, in, ...], or [..., in], is faster with a weight [out, in, ...] that is packed."""
    elements = x.numel() * (1 + linear.growth(weight))
    if torch.compiler.is_compiling() or weight.numel() < max(WEIGHT, share * elements):
        return False
    # Whether inference tensors were changed cannot be told.
    return x.numel() >= ROWS * weight.shape[1] and has_onednn() and not weight.is_inference()


class PackedLinear(nn.Linear):
    """A dense layer in the widest instructions of the processor."""

    def forward(self, input: Tensor) -> Tensor:
        weight, fits = self.weight, input.shape[-1] == self.in_features  # torch's error says what does not
        if fits and _is_for_packed(input, weight, DENSE, SHARE_OF_DENSE) and is_plain(input, weight, self.bias):
            weight = made_of_parameters(self, lambda: torch.ops.mkldnn._reorder_linear_weight(self.weight.detach()))
        return linear(input, weight, self.bias)


class PackedConv2d(nn.Conv2d):
    """A convolution; one of 1 x 1 is a product of matrices where images are large."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        fits = input.dim() == 4 and input.shape[1] == self.in_channels  # torch's error says what does not
        if not fits or not is_plain(input, weight, bias) or not input.is_contiguous():
            return super().forward(input)
        convolution = Convolution.of(self)
        if is_pointwise(input, weight, convolution, single=True):
            along = None if bias is None else bias.view(-1, 1, 1)
            return pointwise(input, weight, along, None, None, convolution)
        if not _is_for_packed(input, weight, convolution, SHARE_OF_CONVOLUTION):
            return super().forward(input)
        options = convolution.padding, convolution.stride, convolution.dilation, convolution.groups
        pack = torch.ops.mkldnn._reorder_convolution_weight
        weight = made_of_parameters(self, lambda: pack(self.weight.detach(), *options, list(input.shape)))
        # Its outputs have their channels last, and networks look at them in other shapes.
        return torch.ops.mkldnn._convolution_pointwise(input, weight, bias, *options, "none", [], "").contiguous()


class PackedLSTM(nn.LSTM):
    """An LSTM; the same digits as torch's own."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:  # type: ignore[override]
        # Whether inference tensors were changed cannot be told.
        if not lstm.fits(self, input, hx) or any(weight.is_inference() for weight in self._parameters.values()):  # type: ignore[union-attr]
            return super().forward(input, hx)
        return lstm.run(self, made_of_parameters(self, lambda: lstm.pack(self)), input, hx)  # type: ignore[arg-type]
