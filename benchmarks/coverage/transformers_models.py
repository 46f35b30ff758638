"""Every model type of transformers' auto classes, tiny, with random weights, and an example batch for it; offline.

Nothing is written down per model but what `transformers_overrides` holds: configurations are made small by the names of
their fields, and inputs follow from the signature of the forward. Where that does not run, the next way is tried.
"""

from __future__ import annotations

import inspect
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.coverage.transformers_overrides import BATCH, CLASSES, CONFIGS, DEFAULTS, INPUTS, WAYS, field_of
from benchmarks.coverage.transformers_shrink import LEVELS, TEXT_IDS, Level, shrink, values_of

_TEXT = 10
_HIDDEN = re.compile(r"hidden_states$|embeds$|^sample$")
_LARGEST = 50_000_000
_HEADS = (
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "MULTIMODAL_LM",
    "CTC",
    "OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "IMAGE_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "TIME_SERIES_PREDICTION",
    "RNNT",
    "TDT",
    "MASKED_LM",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "VISUAL_QUESTION_ANSWERING",
    "TEXT_RECOGNITION",
    "TABLE_RECOGNITION",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "IMAGE_TO_IMAGE",
    "IMAGE_MATTING",
    "POSE_ESTIMATION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    "PRETRAINING",
    "",
    "TEXT_ENCODING",
    "MASK_GENERATION",
    "BACKBONE",
)
"""Which head a model type gets: the first that it has; without a name its base model."""


def names() -> list[str]:
    """The model types that some auto class builds, in order of the alphabet."""
    return sorted({name for head in _HEADS for name in _mapping(head)})


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model in eval mode and keyword arguments for its forward.

    Raises:
        Exception: that of the first attempt, where no configuration builds. A model whose forward always fails is
            returned, for the caller to see why.
    """
    first: tuple[nn.Module, dict[str, Any]] | None = None
    error: Exception | None = None
    for complete, level in _attempts():
        try:
            torch.manual_seed(0)
            config = _config(name, level)
            if level.widths == "kept":
                _check_small(name, config)
            model = _model(name, config)
        except Exception as failure:
            error = error or failure
            continue
        for inputs in _candidates(name, model, config, complete):
            first = first or (model, inputs)
            if _runs(model, inputs):
                return model, inputs
    if first is not None:
        return first
    raise error or RuntimeError("no inputs fit the signature of its forward")


def _attempts() -> list[tuple[bool, Level]]:
    """Whether the inputs are to have every modality, and how much is made small; the dearest last."""
    return [*((True, level) for level in LEVELS[:-1]), *((False, level) for level in LEVELS[:2]), (True, LEVELS[-1])]


def head_of(name: str) -> str:
    """The class that stands for a model type."""
    if name in CLASSES:
        return CLASSES[name]
    heads = list(_HEADS)
    if name in _mapping("MASKED_LM") and name not in _mapping("SEQ_TO_SEQ_CAUSAL_LM"):
        # An encoder, whatever else there is of it.
        heads.insert(0, "SEQUENCE_CLASSIFICATION")
    found = next(_mapping(head)[name] for head in heads if name in _mapping(head))
    return found if isinstance(found, str) else found[0]


def _mapping(head: str) -> dict[str, Any]:
    return getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES" if head else "MODEL_MAPPING_NAMES")


def _config(name: str, level: Level) -> PreTrainedConfig:
    config = DEFAULTS[name]() if name in DEFAULTS else CONFIG_MAPPING[name]()
    return _with(shrink(config, level), CONFIGS.get(name, {}))


def _with(config: PreTrainedConfig, settings: dict[str, Any]) -> PreTrainedConfig:
    """The configuration with some fields set; a dictionary sets fields of a part."""
    if not settings:
        return config
    values = {field: value for field, value in values_of(config).items() if field not in ("id2label", "label2id")}
    for field, value in settings.items():
        part = values.get(field)
        values[field] = _with(part, value) if isinstance(part, PreTrainedConfig) else value
    return type(config)(**{**values, "num_labels": config.num_labels})


def _model(name: str, config: PreTrainedConfig) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, head_of(name))(config).eval()


def _check_small(name: str, config: PreTrainedConfig) -> None:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in _model(name, config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{size:,} parameters at its own widths")


def _runs(model: nn.Module, inputs: dict[str, Any]) -> bool:
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**inputs)
    except Exception:
        return False
    return True


# ------------------------------------------------------------------------------------------------ inputs


def _candidates(name: str, model: nn.Module, config: PreTrainedConfig, complete: bool) -> Iterator[dict[str, Any]]:
    """Inputs to try, the likeliest first: with every modality, or with some of them missing."""
    if name in INPUTS:
        torch.manual_seed(0)
        yield INPUTS[name](model, config)
        return
    accepted = inspect.signature(model.forward).parameters
    ways = [ways if complete else (*ways, None) for argument, ways in WAYS.items() if _is_needed(argument, accepted)]
    for chosen in itertools.product(*ways):
        if not complete and (None not in chosen or not (any(chosen) or "input_ids" in accepted)):
            continue
        torch.manual_seed(0)
        try:
            inputs = _inputs(model, config, [way for way in chosen if way is not None])
        except Exception:
            continue
        yield inputs


def _is_needed(argument: str, accepted: Mapping[str, Any]) -> bool:
    if argument == "pixel_values_videos" and "pixel_values" in accepted:  # the same layers see both
        return False
    return argument in accepted and (argument != "hidden_states" or "grid_thw" in accepted)


def _inputs(model: nn.Module, config: PreTrainedConfig, ways: list[Any]) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    parameters = inspect.signature(model.forward).parameters
    accepted = list(parameters)
    for way in ways:
        inputs.update({k: v for k, v in way(config).items() if k in accepted})
    if "qformer_input_ids" in accepted:
        inputs["qformer_input_ids"] = _words(config, 6)
    if "input_ids" in accepted:
        inputs["input_ids"] = _ids(model, config, inputs)
        if "mm_token_type_ids" in accepted:
            inputs["mm_token_type_ids"] = _kinds(config, inputs["input_ids"])
    if "decoder_input_ids" in accepted and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _words(config, 6)
    if "bbox" in accepted and "input_ids" in inputs:
        corner, size = torch.randint(0, 50, (BATCH, inputs["input_ids"].shape[1], 2)), 10
        inputs["bbox"] = torch.cat([corner, corner + size], -1)
    for argument in accepted:
        if argument not in inputs and parameters[argument].default is inspect.Parameter.empty:
            if argument.endswith("input_ids"):
                inputs[argument] = _words(config, 6)
            elif _HIDDEN.search(argument):
                inputs[argument] = torch.randn(BATCH, 6, _hidden(config))
    if "use_cache" in accepted and getattr(config.get_text_config(), "use_cache", None):
        inputs["use_cache"] = False
    return inputs


def _hidden(config: PreTrainedConfig) -> int:
    return field_of(config, "hidden_size", "d_model", "embed_dim", default=64)


def _words(config: PreTrainedConfig, length: int) -> Tensor:
    low, high = TEXT_IDS
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or high
    return torch.randint(min(low, vocabulary // 3), min(high, vocabulary), (BATCH, length))


def _ids(model: nn.Module, config: PreTrainedConfig, inputs: dict[str, Any]) -> Tensor:
    """Words, and in their middle a placeholder for every feature of an image or a recording."""
    rows = [_words(config, _TEXT // 2)]
    for kind in ("image", "video", "audio"):
        token = _token(config, kind)
        if token is not None:
            rows.append(torch.full((BATCH, _features(model, kind, inputs) // BATCH), token))
    return torch.cat([*rows, _words(config, _TEXT // 2)], 1)


def _token(config: PreTrainedConfig, kind: str) -> int | None:
    for name in (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_pad_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            return token
    return None


def _kinds(config: PreTrainedConfig, ids: Tensor) -> Tensor:
    kinds = torch.zeros_like(ids)
    for number, kind in enumerate(("image", "video", "audio"), 1):
        token = _token(config, kind)
        if token is not None:
            kinds[ids == token] = number
    return kinds


_MODALITY = {
    "image": ("pixel_values", "images"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_values", "audio"),
}


def _features(model: nn.Module, kind: str, inputs: dict[str, Any]) -> int:
    """How many features the model makes of the images (or recordings) among the inputs."""
    if not any(name.startswith(_MODALITY[kind]) for name in inputs):
        return 0
    getter = getattr(model, f"get_{kind}_features", None) or getattr(
        getattr(model, "model", None), f"get_{kind}_features", None
    )
    if getter is None:
        return 0
    names = inspect.signature(getter).parameters
    with torch.no_grad():
        output = getter(**{name: value for name, value in inputs.items() if name in names})
    pooled = getattr(output, "pooler_output", output)
    if isinstance(pooled, Tensor):
        mask = getattr(output, "attention_mask", None) if kind == "audio" else None
        return int(mask.sum()) if isinstance(mask, Tensor) else pooled.shape[:-1].numel()
    return sum(item.shape[:-1].numel() for item in pooled)
