"""Members as plain networks: factors folded into the weights of a copy."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesify.distributions import CLIP
from bayesify.errors import ConversionError
from bayesify.graph import forward_names, is_quantized
from bayesify.layers import MemberBatchNorm, Rank1Layer, Rewritten, Site, bias_of, detach, is_exact, original_class


def merged(model: nn.Module, member: int, tied: bool) -> nn.Module:
    """A plain copy of a converted network with the posterior-mean factors of one member folded into its weights.

    Args:
        tied: whether a site's weight was another parameter as well; it is not in the copy.

    Raises:
        ConversionError: a layer's own code transforms its weight so that factors cannot be folded into it.
    """
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, Rank1Layer):
            _fold(name, layer, member)
        elif isinstance(layer, MemberBatchNorm):
            _fold_norm(layer, member)
        elif isinstance(layer, Rewritten):
            detach(layer)
    config: Any = getattr(plain, "config", None)
    # UMT5, Switch and UDOP scale what the head is given by this flag, and read heads of their own all the same.
    if tied and getattr(config, "tie_word_embeddings", False) and "tie_word_embeddings" not in forward_names(plain):
        config.tie_word_embeddings = False
    return plain


@torch.no_grad()
def _fold(name: str, layer: Rank1Layer, member: int) -> None:
    """Turn a rank-1 layer, in place, into the plain layer of one member at its posterior means."""
    cls = type(layer)
    sites = cast("dict[str, Site]", dict(layer.rank1.items()))
    modes = {module: module.training for module in layer.modules()}
    layer.eval()
    for site in sites.values():
        for factor in (site.s, site.r):
            if factor is not None:
                factor.hold(factor.mean[member : member + 1].clamp(-CLIP, CLIP))
        if site.own_bias is not None:
            site.own_bias.hold(slice(member, member + 1))
    # Hooks may make the weight from other parameters, as the older weight_norm and spectral_norm do.
    plain = is_exact(original_class(cls)) and not layer._forward_pre_hooks
    probe = None if plain else cls.probe_input(layer)
    expected = None
    if probe is not None:
        probe = torch.randn(probe.shape, device=probe.device).to(probe.dtype)
        expected = layer(probe)
    values: dict[str, Tensor] = {}
    for weight in sites:
        if is_quantized(layer.weight_of(weight)):
            raise ConversionError(f"{name}: factors cannot be folded into a weight in low-bit storage.")
        try:
            values[weight], bias = layer.with_draw(weight, 0)
        except ConversionError as error:
            raise ConversionError(f"{name}: {error}") from error
        if bias is not None:
            if getattr(layer, bias_of(weight), None) is None and isinstance(layer, nn.RNNBase):
                raise ConversionError(f"{name}: it has no bias into which added factors could be folded.")
            values[bias_of(weight)] = bias
    detach(layer)
    for path, value in values.items():
        owner, _, weight = path.replace("/", ".").rpartition(".")
        holder = layer.get_submodule(owner)
        old = holder._parameters.get(weight)
        # Plain weights: a new parameter, which breaks ties and keeps the flat weight list of recurrent layers in step.
        # Parametrized weights take the value through their right inverse.
        if old is None and not weight.startswith("bias"):
            setattr(holder, weight, value)
        else:
            setattr(holder, weight, nn.Parameter(value, requires_grad=old is None or old.requires_grad))
    same = expected is None or torch.allclose(layer(probe), expected, rtol=1e-3, atol=1e-4)
    for module, mode in modes.items():
        module.training = mode
    if not same:
        raise ConversionError(
            f"{name} ({type(layer).__name__}) transforms its weight in its own code, so its factors cannot be folded "
            "into it. Keep the Bayesian model, or leave such layers out with exclude= before training."
        )


@torch.no_grad()
def _fold_norm(layer: MemberBatchNorm, member: int) -> None:
    """Turn a batch norm, in place, into the plain one of a member."""
    affine, statistics = layer.state_of(member)
    detach(layer)
    for name, value in affine.items():
        setattr(layer, name, nn.Parameter(value, requires_grad=getattr(layer, name).requires_grad))
    for name, value in statistics.items():
        layer._buffers[name] = value.clone()
