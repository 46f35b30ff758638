"""Members as plain networks: factors folded into the weights of a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bayesify.distributions import DeterministicFactor, Factor, NormalPrior
from bayesify.errors import BayesifyError, ConversionError
from bayesify.graph import forward_names, is_quantized
from bayesify.layers import (
    AdditiveSite,
    MemberBatchNorm,
    MemberVector,
    Rank1Layer,
    Rewritten,
    Site,
    attach,
    bias_of,
    detach,
    is_exact,
    original_class,
    rank1_class,
)
from bayesify.modes import full_float32

_PLAIN_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def merged(model: nn.Module, member: int, tied: bool) -> nn.Module:
    """A plain copy of a converted network with the factors of one member, as they are held, folded into its weights.

    Args:
        member: the row of the draws in force, one for each member.
        tied: whether a site's weight was another parameter as well; it is not in the copy.

    Raises:
        ConversionError: a layer's own code transforms its weight so that factors cannot be folded into it.
    """
    plain = single(model, member)
    fold(plain)
    for module in list(plain.modules()):
        if isinstance(module, Rewritten):
            detach(module)
    config: Any = getattr(plain, "config", None)
    # UMT5, Switch and UDOP scale what the head is given by this flag, and read heads of their own all the same.
    if tied and getattr(config, "tie_word_embeddings", False) and "tie_word_embeddings" not in forward_names(plain):
        config.tie_word_embeddings = False
    return plain


@torch.no_grad()
def single(model: nn.Module, member: int, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of a converted network with one member alone: that row of the draws in force, and its own batch norms.

    Args:
        shared: parameters and buffers that are not copied.
    """
    known: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for layer in model.modules():
        for site in layer.rank1.values() if isinstance(layer, Rank1Layer) else ():
            for part in site.children():
                if isinstance(part, Factor):
                    known[id(part)] = fixed(part.value()[member])
                elif isinstance(part, MemberVector):
                    known[id(part)] = _own(part.value()[member])
    network = copy.deepcopy(model, known)
    for module in list(network.modules()):
        if isinstance(module, MemberBatchNorm):
            _fold_norm(module, member)
    return network


def fixed(vector: Tensor) -> Factor:
    """A factor of one member that is always this vector [d]."""
    return DeterministicFactor(vector.detach().clone()[None], 0.0, NormalPrior())


def _own(vector: Tensor) -> MemberVector:
    own = MemberVector(1, len(vector), vector.device)
    own.offset.copy_(vector)
    return own


def fold(network: nn.Module) -> None:
    """Turn every rank-1 layer of a network of a single member, in place, into the plain layer.

    Raises:
        ConversionError: a layer's own code transforms its weight so that factors cannot be folded into it.
    """
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Rank1Layer):
            fold_layer(name, layer)


@torch.no_grad()
@full_float32()
def fold_layer(name: str, layer: Rank1Layer) -> None:
    """Turn one rank-1 layer of a single member, in place, into the plain layer."""
    cls = type(layer)
    sites = cast("dict[str, Site]", dict(layer.rank1.items()))
    modes = {module: module.training for module in layer.modules()}
    layer.eval()
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
        if parametrize.is_parametrized(holder, weight):  # it takes the value in place, in a tensor that others may hold
            holder.parametrizations = copy.deepcopy(holder.parametrizations)
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


# ------------------------------------------------------------------------------------------------ batch norms


@torch.no_grad()
@full_float32()
def absorb_norm(network: nn.Module, layer_name: str, norm_name: str) -> bool:
    """Make a batch norm in eval mode a part of the layer before it, in place, in a network of a single member.

    y = γ/σ ∘ (r ∘ W (s ∘ x) + b − μ) + β: its scale goes into r and its shift into the bias; a layer without factors
    takes the scale into its weight. What its class does besides is done by its children, such as timm's activation.

    Returns:
        Whether it could be done and gives the same values on a random input; otherwise the network is as it was.
    """
    layer, norm = cast(Any, network.get_submodule(layer_name)), cast(Any, network.get_submodule(norm_name))
    new = copy.deepcopy(layer, {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())})
    plain = not isinstance(new, Rank1Layer)
    x = _probe(new)
    if x is None:
        return False
    try:
        if plain:
            attach(new, {"weight": Site(None, None)})
        site = new.rank1["weight"]
        if isinstance(site, AdditiveSite):
            return False
        _scale_outputs(new, site, norm)
        if plain:
            fold_layer(layer_name, new)
        rest = nn.Identity() if type(norm) in _PLAIN_NORMS else nn.Sequential(*norm.children())
        expected, found = norm(layer(x)), rest(new(x))
    except (BayesifyError, RuntimeError):
        return False
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
        return False
    network.set_submodule(layer_name, new)
    network.set_submodule(norm_name, rest.train(norm.training))
    return True


@torch.no_grad()
def give_scale(network: nn.Module, norm_name: str, layer_name: str) -> bool:
    """Let the layer norm before a dense layer of a single member multiply by its s, in place: s ∘ (γ ∘ x̂ + β).

    Returns:
        Whether the layer has such a factor; otherwise the network is as it was.
    """
    norm, layer = cast(Any, network.get_submodule(norm_name)), network.get_submodule(layer_name)
    site = layer.rank1["weight"] if isinstance(layer, Rank1Layer) and "weight" in layer.rank1 else None
    if not isinstance(site, Site) or isinstance(site, AdditiveSite) or site.s is None:
        return False
    s = site.s.value()[0]
    new = copy.deepcopy(norm)
    for name in ("weight", "bias"):
        value = getattr(norm, name, None)
        if value is not None:
            setattr(new, name, nn.Parameter((value.float() * s.float()).to(value.dtype), requires_grad=False))
    network.set_submodule(norm_name, new)
    site.s = None
    return True


def _probe(layer: Any) -> Tensor | None:
    cls = rank1_class(type(layer)) if not isinstance(layer, Rank1Layer) else type(layer)
    x = None if cls is None else cls.probe_input(layer)
    if x is None:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator).to(x)


def _scale_outputs(layer: Any, site: Site, norm: Any) -> None:
    """r ← r γ/σ and b ← (b − μ) γ/σ + β."""
    mean, variance = norm.running_mean.float(), norm.running_var.float()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.float()
    bias = -mean
    if layer.bias is not None:
        bias = bias + layer.bias.float()
    if site.own_bias is not None:
        bias, site.own_bias = bias + site.own_bias.value()[0].float(), None
    bias = bias * scale if norm.bias is None else bias * scale + norm.bias.float()
    r = scale if site.r is None else scale * site.r.value()[0].float()
    site.r = fixed(r)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
