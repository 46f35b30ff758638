"""What is known beside names of fields: how models want images and sound, and settings of single model types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor
from transformers import PreTrainedConfig

from benchmarks.coverage.transformers_shrink import parts

BATCH = 2

CLASSES: dict[str, str] = {
    "bark": "BarkSemanticModel",
}
"""Classes that stand for a type in place of the first head."""

DEFAULTS: dict[str, Callable[[], PreTrainedConfig]] = {
    "autoformer": lambda: t.AutoformerConfig(prediction_length=4, context_length=12, num_time_features=1),
    "bark": t.BarkSemanticConfig,
    "gemma4": lambda: t.Gemma4Config(vision_config=t.Gemma4VisionConfig(), audio_config=t.Gemma4AudioConfig()),
    "informer": lambda: t.InformerConfig(prediction_length=4, context_length=12, num_time_features=1),
    "time_series_transformer": lambda: t.TimeSeriesTransformerConfig(
        prediction_length=4, context_length=12, num_time_features=1
    ),
}
"""Configurations to start from where that without arguments does not build."""

CONFIGS: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 127, **{f"IMGIMG{c}Z": i for i, c in enumerate("ABCDEFGH")}}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "emu3": {"vocabulary_map": {"<image>": 127, **{f"<|visual token {i:06d}|>": i for i in range(8)}}},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
}
"""Fields set after shrinking."""


def _series(model: Any, config: Any) -> dict[str, Any]:
    length = config.context_length + max(config.lags_sequence)
    features = config.num_time_features
    return {
        "past_values": torch.rand(BATCH, length),
        "past_time_features": torch.rand(BATCH, length, features),
        "past_observed_mask": torch.ones(BATCH, length),
        "static_categorical_features": None,
        "future_values": torch.rand(BATCH, config.prediction_length),
        "future_time_features": torch.rand(BATCH, config.prediction_length, features),
    }


def _spectrogram_and_text(model: Any, config: Any) -> dict[str, Any]:
    audio = config.audio_config
    return {
        "input_features": torch.randn(BATCH, 1, audio.spec_size // 2, audio.num_mel_bins),
        "input_ids": torch.randint(40, 96, (BATCH, 10)),
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    }


def _decisions(model: Any, config: Any) -> dict[str, Any]:
    return {
        "states": torch.randn(BATCH, 6, config.state_dim),
        "actions": torch.randn(BATCH, 6, config.act_dim),
        "rewards": torch.randn(BATCH, 6, 1),
        "returns_to_go": torch.randn(BATCH, 6, 1),
        "timesteps": torch.arange(6).expand(BATCH, 6).clone(),
        "attention_mask": torch.ones(BATCH, 6, dtype=torch.long),
    }


INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "autoformer": _series,
    "clap": _spectrogram_and_text,
    "decision_transformer": _decisions,
    "dia": lambda model, config: {
        "input_ids": torch.randint(40, 96, (BATCH, 10)),
        "decoder_input_ids": torch.randint(40, 96, (BATCH, 6, config.decoder_config.num_channels)),
        "use_cache": False,
    },
    "informer": _series,
    "time_series_transformer": _series,
}
"""Inputs of the forward, from the model and its configuration."""


# ------------------------------------------------------------------------------------------------ images


def _vision(config: PreTrainedConfig) -> PreTrainedConfig:
    names = ("vision_config", "image_config", "vision_encoder_config", "encoder_config", "encoder", "backbone_config")
    found = parts(config)
    for name in ("thinker_config", *names):
        if name in found:
            return _vision(found[name])
    return config


def field_of(config: PreTrainedConfig, *names: str, default: Any) -> Any:
    return next((v for v in (getattr(config, n, None) for n in names) if v), default)


def _sizes(config: PreTrainedConfig) -> tuple[int, int, int]:
    vision = _vision(config)
    size = field_of(config, "image_size", default=None) or field_of(vision, "image_size", "img_size", default=64)
    height, width = (size, size) if isinstance(size, int) else (list(size) * 2)[:2]
    channels = field_of(vision, "num_channels", "in_channels", "in_chans", "channels", default=3)
    return channels if isinstance(channels, int) else 3, height, width


def _image(config: PreTrainedConfig) -> dict[str, Any]:
    channels, height, width = _sizes(config)
    return {"pixel_values": torch.randn(BATCH, channels, height, width)}


def _image_sized(config: PreTrainedConfig) -> dict[str, Any]:
    """With the sizes before padding (Pixtral)."""
    _, height, width = _sizes(config)
    return {**_image(config), "image_sizes": torch.tensor([[height, width]] * BATCH)}


def _image_tiles(config: PreTrainedConfig) -> dict[str, Any]:
    """Two tiles an image."""
    channels, height, width = _sizes(config)
    return {
        "pixel_values": torch.randn(BATCH, 2, channels, height, width),
        "pixel_attention_mask": torch.ones(BATCH, 2, height, width, dtype=torch.bool),
        "image_sizes": torch.tensor([[height, width]] * BATCH),
    }


def _image_patches(config: PreTrainedConfig) -> dict[str, Any]:
    """Patches of all images in one row, with the grid of each (Qwen-VL)."""
    vision = _vision(config)
    merge = field_of(vision, "spatial_merge_size", "merge_size", default=2)
    patch, time = field_of(vision, "patch_size", default=14), field_of(vision, "temporal_patch_size", default=1)
    size = _sizes(config)[0] * time * patch * patch
    grid = torch.tensor([[1, 2 * merge, 2 * merge]] * BATCH)
    patches = torch.randn(int(grid.prod(-1).sum()), size)
    return {
        "pixel_values": patches,
        "hidden_states": patches,
        "image_grid_thw": grid,
        "grid_thw": grid,
        "image_grid_hws": grid[:, 1:],
    }


def _image_squares(config: PreTrainedConfig) -> dict[str, Any]:
    """The same with the patches still square (Kimi)."""
    inputs = _image_patches(config)
    patch = field_of(_vision(config), "patch_size", default=14)
    return {**inputs, "pixel_values": inputs["pixel_values"].unflatten(1, (-1, patch, patch))}


def _image_sequence(config: PreTrainedConfig) -> dict[str, Any]:
    """Flattened patches of each image, with a mask and their places (SigLIP 2, Gemma 4)."""
    patch = field_of(_vision(config), "patch_size", default=16)
    patch, side = patch if isinstance(patch, int) else patch[0], 6
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(BATCH, -1, -1).clone()
    return {
        "pixel_values": torch.randn(BATCH, side * side, _sizes(config)[0] * patch * patch),
        "pixel_attention_mask": torch.ones(BATCH, side * side, dtype=torch.long),
        "spatial_shapes": torch.tensor([[side, side]] * BATCH),
        "pixel_position_ids": places,
        "image_position_ids": places,
    }


def _frames(config: PreTrainedConfig) -> int:
    return field_of(_vision(config), "num_frames", "frames_per_clip", default=4)


def _clip(config: PreTrainedConfig) -> dict[str, Any]:
    channels, height, width = _sizes(config)
    return {"pixel_values": torch.randn(BATCH, _frames(config), channels, height, width)}


def _videos(config: PreTrainedConfig) -> dict[str, Any]:
    channels, height, width = _sizes(config)
    clip = torch.randn(BATCH, _frames(config), channels, height, width)
    return {"pixel_values_videos": clip}


# ------------------------------------------------------------------------------------------------ sound


def _audio(config: PreTrainedConfig) -> PreTrainedConfig:
    found = parts(config)
    for name in ("thinker_config", "audio_config", "encoder_config", "speech_config", "speech_encoder", "encoder"):
        if name in found:
            return _audio(found[name])
    return config


def _bands(config: PreTrainedConfig) -> tuple[int, int]:
    """Mel bands and the number of frames."""
    audio = _audio(config)
    names = ("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "input_dim", "input_feat_size")
    bands = field_of(audio, *names, "feature_projection_input_dim", "mel_bins", default=128)
    positions = field_of(audio, "max_source_positions", default=None)
    return bands, 2 * positions if positions and positions <= 512 else field_of(audio, "max_length", default=128)


def _bands_first(config: PreTrainedConfig) -> dict[str, Any]:
    bands, frames = _bands(config)
    return _features_of(torch.randn(BATCH, bands, frames), frames)


def _bands_last(config: PreTrainedConfig) -> dict[str, Any]:
    bands, frames = _bands(config)
    return _features_of(torch.randn(BATCH, frames, bands), frames)


def _features_of(features: Tensor, frames: int) -> dict[str, Any]:
    mask = torch.ones(BATCH, frames, dtype=torch.long)
    return {
        "input_features": features,
        "input_values": features,
        "feature_attention_mask": mask,
        "input_features_mask": mask.bool(),
    }


def _wave(config: PreTrainedConfig) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 3840)}


def _wave_of_channel(config: PreTrainedConfig) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, field_of(config, "audio_channels", default=1), 3840)}


WAYS: dict[str, tuple[Any, ...]] = {
    "pixel_values": (_image, _image_sized, _image_tiles, _image_patches, _image_squares, _image_sequence, _clip),
    "pixel_values_videos": (_videos,),
    "hidden_states": (_image_patches,),
    "input_features": (_bands_first, _bands_last),
    "input_values": (_wave, _wave_of_channel, _bands_last),
}
