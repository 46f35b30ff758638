"""Rank-1 experts: the fused weights [E, ., .] of transformers' mixtures of experts.

Each expert e has its own W_e ∘ (r_e s_eᵀ): s has E·in entries, r has E·out. A token carries the draw of its row,
whatever other tokens its expert gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesify.errors import BayesifyError, ConversionError
from bayesify.layers.registry import Rank1Layer, bias_of, rank1_where
from bayesify.layers.site import AdditiveSite, Site


def is_experts(cls: type[nn.Module]) -> bool:
    """Whether a class is made by transformers' `use_experts_implementation`, which says what its weights are."""
    return hasattr(cls, "_apply_gate") and hasattr(cls.forward, "__wrapped__")


@rank1_where(is_experts)
class Rank1Experts(Rank1Layer):
    """down(act(up x)) of the experts that the router chose for each token, weighted and summed.

    A loop over experts; transformers' batched and grouped kernels, which have no place for factors, are not used.
    """

    num_experts: int
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states [tokens, in], tokens of one row side by side; experts and weights [tokens, k]."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # marks slots without an expert
                continue
            token, slot = torch.where(top_k_index == expert)
            place = (expert, token, len(hidden_states))
            x = self._map(self._up, hidden_states[token], *place)
            x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
            x = self._map("down_proj", x, *place)
            if self.has_post_expert_norm:
                x = self.post_expert_norm(x)
            output = output.index_add(0, token, (x * top_k_weights[token, slot, None]).to(output.dtype))
        return output

    @property
    def _up(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def _map(self, name: str, x: Tensor, expert: int, token: Tensor, tokens: int) -> Tensor:
        site: Site = self.rank1[name]  # type: ignore[assignment]
        weight = getattr(self, name)[expert]
        if site.s is not None:
            x = site.enter(x, self._rows(site.s.value(), expert, token, tokens).to(x.dtype))
        y = x @ (weight if self.is_transposed else weight.t())
        bias = getattr(self, bias_of(name))[expert] if self.has_bias else None
        if bias is not None and site.own_bias is not None:
            bias = bias + self._rows(site.own_bias.value(), expert, token, tokens).to(bias.dtype)
        if site.r is None:
            return y if bias is None else y + bias
        return site.leave(y, self._rows(site.r.value(), expert, token, tokens).to(y.dtype), bias)

    def _rows(self, draw: Tensor, expert: int, token: Tensor, tokens: int) -> Tensor:
        """[tokens of the expert, d] of a draw [R, E·d]."""
        drawn = len(draw)
        if tokens % drawn:
            raise BayesifyError(
                f"rank-1 experts got {tokens} tokens, which is no multiple of the {drawn} rows of their factors. Call "
                "the BayesianModel, not the network inside it."
            )
        own = draw.view(drawn, self.num_experts, -1)[:, expert]
        return own if drawn == 1 else own[token * drawn // tokens]

    @classmethod
    def sizes(cls, layer: Any) -> dict[str, tuple[int, int]]:
        found = {}
        for name in ("gate_up_proj" if layer.has_gate else "up_proj", "down_proj"):
            experts, *sizes = getattr(layer, name).shape
            outputs, inputs = sizes[::-1] if layer.is_transposed else sizes
            found[name] = (experts * inputs, experts * outputs)
        return found

    def folded(self, name: str, s: Tensor | None, r: Tensor | None) -> Tensor:
        weight = getattr(self, name)
        for vector, dim in ((s, 1 if self.is_transposed else 2), (r, 2 if self.is_transposed else 1)):
            if vector is not None:
                weight = weight * vector.to(weight.dtype).view(len(weight), -1).unsqueeze(3 - dim)
        return weight

    def with_draw(self, name: str, row: int) -> tuple[Tensor, Tensor | None]:
        site: Site = self.rank1[name]  # type: ignore[assignment]
        if isinstance(site, AdditiveSite):
            raise ConversionError("what is added around experts cannot be folded into their weights.")
        bias, own = self.bias_beside(name), site.own_bias_of(row)
        if bias is not None and own is not None:
            bias = bias + own.view_as(bias).to(bias.dtype)
        return self.folded(name, *site.vectors(row)), bias
