"""Example inputs: given by the user, or made from what timm and transformers say of their models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


def as_inputs(example_inputs: Any) -> Inputs:
    """A tensor, a tuple of positional arguments or a mapping of keyword arguments as (args, kwargs)."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def sizes_of(inputs: Inputs) -> str:
    """Inputs in words: their names and shapes."""
    named = [*((f"input {place}", value) for place, value in enumerate(inputs[0])), *inputs[1].items()]
    return (
        ", ".join(f"{name} {list(value.shape)}" for name, value in named if isinstance(value, Tensor)) or "no tensors"
    )


def derive_inputs(model: nn.Module, batch: int = 2) -> Inputs | None:
    """Two examples of the right shape for a timm or transformers model; `None` for any other."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    config = getattr(model, "config", None)
    if isinstance(getattr(model, "main_input_name", None), str) and config is not None:
        kwargs = _transformers_inputs(model, config, batch, device, dtype)
        return None if kwargs is None else ((), kwargs)
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = cfg.get("input_size") if isinstance(cfg, Mapping) else None
    if size is None:
        return None
    return (torch.randn(batch, *size, device=device, dtype=dtype),), {}


def _transformers_inputs(
    model: Any, config: Any, batch: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor] | None:
    text = getattr(config, "get_text_config", lambda: config)()
    main = model.main_input_name
    kwargs: dict[str, Any] = {}
    if main == "input_ids":
        vocabulary = int(getattr(text, "vocab_size", 0) or 0)
        if not vocabulary:
            return None
        kwargs["input_ids"] = torch.randint(min(3, vocabulary - 1), vocabulary, (batch, 6), device=device)
    elif main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", None) or 3
        kwargs["pixel_values"] = torch.randn(batch, channels, height, width, device=device, dtype=dtype)
    elif main == "input_values":
        kwargs["input_values"] = torch.randn(batch, 1600, device=device, dtype=dtype)
    else:
        return None
    if getattr(config, "is_encoder_decoder", False) and "input_ids" in kwargs:
        kwargs["decoder_input_ids"] = kwargs["input_ids"][:, :4]
    return kwargs
