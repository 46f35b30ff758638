"""Rank-1 convolutions: s has one entry an input channel, r one an output channel, shared by all positions and taps.

Grouped and depth-wise convolutions obey the same rule, as if the block-diagonal kernel were written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesify.errors import BayesifyError
from bayesify.layers.maps import Convolution
from bayesify.layers.registry import Rank1Layer, rank1

_PLAIN = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)


class _Rank1Conv(Rank1Layer):
    """y = r ∘ conv(s ∘ x) + b for x [N, in, ...], s [N, in], r [N, out]."""

    channel_dim = 1
    weight: Tensor
    bias: Tensor | None
    groups: int
    kernel_size: tuple[int, ...]

    @classmethod
    def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
        return {"weight": (layer.in_channels, layer.out_channels)}

    @classmethod
    def probe_input(cls, layer: Any) -> Tensor | None:
        parameter = next(layer.parameters())
        extent = [d * (k - 1) + 1 + s for d, k, s in zip(layer.dilation, layer.kernel_size, layer.stride, strict=True)]
        return torch.empty(2, layer.in_channels, *extent, dtype=parameter.dtype, device=parameter.device)

    def _check(self, x: Tensor) -> None:
        spatial = len(self.kernel_size)
        if x.dim() != spatial + 2:
            raise BayesifyError(
                f"a rank-1 {type(self).__name__} needs a batched input of {spatial + 2} dimensions; "
                f"found {tuple(x.shape)}. Add the batch dimension."
            )

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        site, layer = self.site, cast(Any, self)
        own = layer._conv_forward.__func__ not in _PLAIN
        if layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and not own:
            return site.product(input, self.weight, self.bias, Convolution.of(self), 1)
        y = layer._conv_forward(site.scale_inputs(input, 1), self.weight, None)
        return site.scale_outputs(y, self.bias, 1)

    def applied(self, name: str, s: Tensor) -> Tensor:
        layer = cast(Any, self)
        if layer.padding_mode == "zeros" and layer.padding not in ("valid", (0,) * len(self.kernel_size)):
            return super().applied(name, s)  # zeros at the border are not moved by s
        per_tap = getattr(self, name).flatten(2).sum(-1).unflatten(0, (self.groups, -1))
        return torch.einsum("goi,gi->go", per_tap, s.view(self.groups, -1)).flatten()

    def folded(self, name: str, s: Tensor | None, r: Tensor | None) -> Tensor:
        weight: Tensor = getattr(self, name)
        return Convolution.of(self).folded(weight, *(None if v is None else v.to(weight.dtype) for v in (s, r)))


class _Rank1ConvTranspose(_Rank1Conv):
    def applied(self, name: str, s: Tensor) -> Tensor:
        return Rank1Layer.applied(self, name, s)  # fewer taps reach the border

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        self._check(input)
        site, layer = self.site, cast(Any, self)
        spatial = len(self.kernel_size)
        output_padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, self.kernel_size, spatial, layer.dilation
        )
        return site.product(input, self.weight, self.bias, Convolution.of(self, list(output_padding)), 1)


@rank1("timm.layers.conv2d_same.Conv2dSame")
class Rank1Conv2dSame(_Rank1Conv):
    """timm's convolution with as many zeros around its input as the size of that asks for."""

    plain_forward_only = True

    @classmethod
    def own_forward(cls) -> Callable[..., Any]:
        return Rank1Conv2dSame._padded

    def _padded(self, x: Tensor) -> Tensor:
        from timm.layers.padding import pad_same

        self._check(x)
        layer = cast(Any, self)
        padded = pad_same(x, layer.kernel_size, layer.stride, layer.dilation)
        return self.site.product(padded, self.weight, self.bias, Convolution.of(self), 1)

    def applied(self, name: str, s: Tensor) -> Tensor:
        return Rank1Layer.applied(self, name, s)  # zeros at the border are not moved by s


@rank1(nn.Conv1d)
class Rank1Conv1d(_Rank1Conv, nn.Conv1d): ...


@rank1(nn.Conv2d)
class Rank1Conv2d(_Rank1Conv, nn.Conv2d): ...


@rank1(nn.Conv3d)
class Rank1Conv3d(_Rank1Conv, nn.Conv3d): ...


@rank1(nn.ConvTranspose1d)
class Rank1ConvTranspose1d(_Rank1ConvTranspose, nn.ConvTranspose1d): ...


@rank1(nn.ConvTranspose2d)
class Rank1ConvTranspose2d(_Rank1ConvTranspose, nn.ConvTranspose2d): ...


@rank1(nn.ConvTranspose3d)
class Rank1ConvTranspose3d(_Rank1ConvTranspose, nn.ConvTranspose3d): ...
