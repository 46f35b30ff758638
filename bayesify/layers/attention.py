"""Rank-1 attention: the in and out projections of `nn.MultiheadAttention`, and layers whose fused kernels skip them.

Legend: N rows, L queries, S keys, E channels, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayesify.layers.linear import fold_matrix
from bayesify.layers.maps import DENSE
from bayesify.layers.registry import Derived, Rank1Layer, rank1
from bayesify.layers.site import Site

OUT_BATCH_DIM = 1
"""Where the out projection sees the batch. It works on [L, N, E] as in torch, so that dropout after it, which follows
the order of memory, draws the same mask."""

_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@rank1(nn.MultiheadAttention)
class Rank1MultiheadAttention(Rank1Layer, nn.MultiheadAttention):
    """Attention whose in projections carry factors: one site for a packed weight [3E, E], else one for each of q, k, v.

    The out projection is a layer of its own, which is called here; the fused kernels that read its weight are not used.
    """

    children_apart = True
    plain_forward_only = True

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        inputs = [_rows_first(x, batched, self.batch_first) for x in (query, key, value)]
        q, k, v = self._project(inputs, same=query is key and key is value)
        if attn_mask is None and is_causal:
            raise RuntimeError("is_causal is a hint about attn_mask: give the mask, too.")
        causal = is_causal and key_padding_mask is None and not need_weights
        bias = None if causal else _additive(attn_mask, q.dtype)
        padding = _additive(key_padding_mask, q.dtype)
        if padding is not None and not batched:
            padding = padding[None]
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, own.to(x.dtype).expand(len(x), 1, -1)], 1) for x, own in
                    ((k, self.bias_k), (v, self.bias_v)))  # fmt: skip
            bias, padding = _one_more_key(bias), _one_more_key(padding)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [N, H, ., E/H]
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(*x.shape[:2], 1, x.shape[3])], 2) for x in (k, v))
            bias, padding = _one_more_key(bias), _one_more_key(padding)
        if bias is not None and bias.dim() == 3:
            bias = bias.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            padding = padding[:, None, None]
            bias = padding if bias is None else bias + padding
        mixed, weights = self._attend(q, k, v, bias, causal, need_weights)
        output = self.out_proj(mixed.permute(2, 0, 1, 3).flatten(2))  # [L, N, E]; its site knows, see OUT_BATCH_DIM
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output[:, 0], None if weights is None else weights[0]
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[N, H, L, E/H] mixed values and, if wanted, the weights [N, H, L, S]."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, bias, dropout, causal), None
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        if dropout:
            weights = F.dropout(weights, dropout)
        return weights @ v, weights

    def _project(self, inputs: list[Tensor], same: bool) -> list[Tensor]:
        """Queries, keys and values [N, ., E]."""
        site: Site
        if not self._qkv_same_embed_dim:
            biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            projected = []
            for name, x, bias in zip(_SEPARATE, inputs, biases, strict=True):
                site = self.rank1[name]  # type: ignore[assignment]
                projected.append(site.product(x, getattr(self, name), bias, DENSE))
            return projected
        site = self.rank1["in_proj_weight"]  # type: ignore[assignment]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if same:
            return list(site.product(inputs[0], weight, bias, DENSE).chunk(3, -1))
        projected = []
        for part, x in enumerate(inputs):
            rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
            projected.append(site.product(x, weight[rows], None if bias is None else bias[rows], DENSE, part=rows))
        return projected

    @classmethod
    def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
        names = ("in_proj_weight",) if layer._qkv_same_embed_dim else _SEPARATE
        weights = {name: getattr(layer, name) for name in names}
        return {name: (weight.shape[1], weight.shape[0]) for name, weight in weights.items()}

    def folded(self, name: str, s: Tensor | None, r: Tensor | None) -> Tensor:
        return fold_matrix(getattr(self, name), s, r)

    def applied(self, name: str, s: Tensor) -> Tensor:
        return F.linear(s, getattr(self, name))


def _rows_first(x: Tensor, batched: bool, batch_first: bool) -> Tensor:
    """[N, L, E] of whatever layout."""
    if not batched:
        return x[None]
    return x if batch_first else x.transpose(0, 1)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask to add to the scores: true entries of a boolean one forbid."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.bool(), float("-inf"))


def _one_more_key(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else F.pad(mask, (0, 1))


# ------------------------------------------------------------------------------------------------ fused kernels

FUSED = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Layers that, outside of training, may read their children's weights in one fused kernel without calling them."""


class Unfused(Derived):
    """A layer of torch.nn with its fused kernel turned off, so that its children are called."""

    prefix = "Unfused"

    # What layers ask themselves before they use one: properties come before what they have set on themselves.
    use_nested_tensor = property(lambda self: False)
    activation_relu_or_gelu = property(lambda self: 0)
