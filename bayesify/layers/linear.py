"""Rank-1 dense layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify.layers.maps import DENSE
from bayesify.layers.registry import Rank1Layer, rank1


@rank1(nn.Linear)
class Rank1Linear(Rank1Layer, nn.Linear):
    """y = r ∘ (W (s ∘ x)) + b for x [N, ..., in], W [out, in], s [N, in], r [N, out] (paper Fig. 2)."""

    def forward(self, input: Tensor) -> Tensor:
        return self.site.product(input, self.weight, self.bias, DENSE)

    @classmethod
    def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
        return {"weight": (layer.in_features, layer.out_features)}

    @classmethod
    def probe_input(cls, layer: Any) -> Tensor | None:
        return torch.empty(2, layer.in_features, dtype=_dtype(layer), device=_device(layer))

    def folded(self, name: str, s: Tensor | None, r: Tensor | None) -> Tensor:
        return fold_matrix(getattr(self, name), s, r)

    def applied(self, name: str, s: Tensor) -> Tensor:
        return F.linear(s, getattr(self, name))


@rank1("transformers.pytorch_utils.Conv1D")
class Rank1Conv1DMatrix(Rank1Layer):
    """transformers' `Conv1D`, a dense layer with its weight stored as [in, out]."""

    @classmethod
    def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
        return {"weight": (layer.weight.shape[0], layer.weight.shape[1])}

    @classmethod
    def probe_input(cls, layer: Any) -> Tensor | None:
        return layer.weight.new_empty(2, layer.weight.shape[0])

    def folded(self, name: str, s: Tensor | None, r: Tensor | None) -> Tensor:
        return fold_matrix(getattr(self, name).t(), s, r).t().contiguous()

    def applied(self, name: str, s: Tensor) -> Tensor:
        return s @ getattr(self, name)


def fold_matrix(weight: Tensor, s: Tensor | None, r: Tensor | None, out: Tensor | None = None) -> Tensor:
    """W ∘ (r sᵀ) for W [out, in], in the dtype of W; written to `out`, if given."""
    s, r = (None if v is None else v.to(weight.dtype) for v in (s, r))
    return DENSE.folded(weight, s, r, out)


def _dtype(layer: nn.Module) -> torch.dtype:
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _device(layer: nn.Module) -> torch.device:
    return next((p.device for p in layer.parameters()), torch.device("cpu"))
