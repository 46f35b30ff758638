"""Rank-1 embeddings, with factors on their outputs alone, and bilinear maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bayesify.layers.registry import Rank1Layer, rank1
from bayesify.layers.site import AdditiveSite, Site


@rank1(nn.Embedding)
class Rank1Embedding(Rank1Layer, nn.Embedding):
    """y = r ∘ E[i] for indices i [N, ...]: one r [N, d] for all entries of a row. There is no input to scale."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super(Rank1Layer, self).forward(input, *args, **kwargs)  # type: ignore[misc]
        return self.site.rescale_outputs(y, None)

    @classmethod
    def own_forward(cls) -> Callable[..., Any]:
        return Rank1Embedding.forward

    @classmethod
    def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
        return {"weight": (0, layer.embedding_dim)}

    def with_draw(self, name: str, row: int) -> tuple[Tensor, Tensor | None]:
        site = self.site
        _, r = site.vectors(row)
        if r is None:
            return self.weight, None
        r = r.to(self.weight.dtype)
        return self.weight + r if isinstance(site, AdditiveSite) else self.weight * r, None


@rank1(nn.Bilinear)
class Rank1Bilinear(Rank1Layer, nn.Bilinear):
    """y_o = r_o (s ∘ x)ᵀ W_o z + b_o for inputs x [N, ..., in1], z [N, ..., in2]: s scales the first of them."""

    plain_forward_only = True

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:  # type: ignore[override]
        site: Site = self.site
        y = F.bilinear(site.scale_inputs(input1), input2, self.weight)
        return site.scale_outputs(y, self.bias)

    @classmethod
    def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
        return {"weight": (layer.in1_features, layer.out_features)}

    def folded(self, name: str, s: Tensor | None, r: Tensor | None) -> Tensor:
        weight = self.weight
        for vector, shape in ((s, (1, -1, 1)), (r, (-1, 1, 1))):
            weight = weight if vector is None else weight * vector.to(weight.dtype).view(shape)
        return weight
