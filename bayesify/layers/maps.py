"""Linear maps with what a site needs of them: the map, a draw of its factors folded into the weight, gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesify.layers import matmul


class Map(Protocol):
    """A linear map and its gradients."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def folded(self, weight: Tensor, s: Tensor | None, r: Tensor | None, out: Tensor | None = None) -> Tensor:
        """W ∘ (r sᵀ) for s [in], r [out]; written to a tensor of the shape of W, if given."""
        ...

    def laid_out(self, weight: Tensor, like: Tensor, calls: int, backward: bool = False) -> Tensor:
        """The weight as that many calls with inputs like this one want it, or calls back with such gradients."""
        ...

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, back: Tensor | None, of_weight: bool, total: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of x and of the weight.

        Args:
            back: the weight as it was laid out for calls back; nothing, if no gradient of x is wanted.
            of_weight: whether one of the weight is wanted.
            total: what it is added to, in place, if anything.
        """
        ...

    def growth(self, weight: Tensor) -> float:
        """Size of y over that of x, about."""
        ...


@dataclass(frozen=True)
class Dense:
    """y = x Wᵀ for x [N, ..., in], W [out, in]."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return matmul.linear(x, weight, bias)

    def folded(self, weight: Tensor, s: Tensor | None, r: Tensor | None, out: Tensor | None = None) -> Tensor:
        return _multiplied(weight, s, None if r is None else r[:, None], out)

    def laid_out(self, weight: Tensor, like: Tensor, calls: int, backward: bool = False) -> Tensor:
        matrix = weight.t() if backward else weight
        return matmul.packed(matrix, like) if calls > 1 else matrix

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, back: Tensor | None, of_weight: bool, total: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        of_x = None if back is None else matmul.linear(grad, back)
        if not of_weight:
            return of_x, None
        # Not oneDNN's product, which would copy both sides to transpose them.
        left, right = grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1])
        return of_x, left @ right if total is None else total.addmm_(left, right)

    def growth(self, weight: Tensor) -> float:
        return weight.shape[0] / weight.shape[1]


@dataclass(frozen=True)
class Convolution:
    """A convolution with zeros around its input, or a transposed one; x [N, in, ...]."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    @classmethod
    def of(cls, layer: Any, output_padding: list[int] | None = None) -> Convolution:
        """That of a layer of torch, but for padding in words."""
        padding = [0] if isinstance(layer.padding, str) else list(layer.padding)
        more = output_padding or [0] * len(layer.kernel_size)
        return cls(list(layer.stride), padding, list(layer.dilation), layer.transposed, more, layer.groups)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # which knows the functions for layers, but on a CPU not this one
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return torch.convolution(
            x, weight, bias, self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups
        )

    def folded(self, weight: Tensor, s: Tensor | None, r: Tensor | None, out: Tensor | None = None) -> Tensor:
        first, second = (s, r) if self.transposed else (r, s)  # of the weight's dimensions, grouped by the first
        taps = weight[0, 0].numel()
        shape = (self.groups, -1, weight.shape[1] * taps)
        if first is not None:
            first = first.view(self.groups, -1, 1)
        if second is not None:
            second = second.view(self.groups, 1, -1, 1).expand(-1, -1, -1, taps).reshape(self.groups, 1, -1)
        into = None if out is None else out.view(shape)
        return _multiplied(weight.reshape(shape), second, first, into).view(weight.shape)

    def laid_out(self, weight: Tensor, like: Tensor, calls: int, backward: bool = False) -> Tensor:
        return weight

    def gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, back: Tensor | None, of_weight: bool, total: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        of = [back is not None, of_weight, False]
        options = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups, of)
        of_x, of_kernel, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *options)
        return of_x, of_kernel if total is None or of_kernel is None else total.add_(of_kernel)

    def is_one_by_one(self, weight: Tensor) -> bool:
        """Whether it only mixes the channels at each position."""
        plain = self.groups == 1 and not self.transposed and not any(self.padding)
        return plain and {*self.stride, *weight.shape[2:]} == {1}

    def is_depthwise(self, x: Tensor, weight: Tensor) -> bool:
        """Whether each channel is an output of its own."""
        return self.groups == x.shape[1] == weight.shape[0] and weight.shape[1] == 1

    def growth(self, weight: Tensor) -> float:
        outputs, inputs = weight.shape[0], weight.shape[1] * self.groups
        stride = math.prod(self.stride)
        return inputs * stride / outputs if self.transposed else outputs / (inputs * stride)


DENSE = Dense()


def _multiplied(value: Tensor, one: Tensor | None, other: Tensor | None, out: Tensor | None) -> Tensor:
    """value ∘ one ∘ other."""
    if out is None:
        return value * (1 if one is None else one) * (1 if other is None else other)
    value = value if one is None else torch.mul(value, one, out=out)
    return value if other is None else torch.mul(value, other, out=out)
