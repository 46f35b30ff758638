"""Choosing, saving and restoring the preprocessing that a pretrained model expects."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bayesify.data.columns import Kind
from bayesify.data.inputs import HubImagePreprocessing, ImagePreprocessing, TextPreprocessing
from bayesify.errors import BayesifyError, ConfigError, DataError, FormatError

Preprocessing = ImagePreprocessing | HubImagePreprocessing | TextPreprocessing
_TYPES: dict[str, Any] = {
    "image": ImagePreprocessing,
    "hub-image": HubImagePreprocessing,
    "text": TextPreprocessing,
}


def preprocessing_from_dict(fields: Mapping[str, Any], folder: str | Path) -> Preprocessing:
    """The preprocessing that `save(folder)` wrote and described by `to_dict()`.

    Raises:
        FormatError: a field is unknown, missing or wrong, or a file of `folder` is missing or broken.
    """
    if not isinstance(fields, Mapping):
        raise FormatError(f"preprocessing must be an object; found {type(fields).__name__}.")
    cls = _TYPES.get(str(fields.get("type")))
    if cls is None:
        raise FormatError(f"preprocessing.type must be one of {', '.join(_TYPES)}; found {fields.get('type')!r}.")
    expected = {field.name for field in dataclasses.fields(cls)} - {"processor", "tokenizer"}
    values = {name: value for name, value in fields.items() if name != "type"}
    if wrong := sorted(values.keys() ^ expected):
        problem = "is unknown" if wrong[0] in values else "is missing"
        raise FormatError(f"preprocessing.{wrong[0]} {problem}; its fields are type, {', '.join(sorted(expected))}.")
    if cls is HubImagePreprocessing:
        values["processor"] = load_processor(folder)
    if cls is TextPreprocessing:
        values["tokenizer"] = load_tokenizer(folder)
    try:
        return cls(**values)
    except (ConfigError, TypeError) as error:
        raise FormatError(f"preprocessing: {error}") from error


def preprocessing_for(
    model: nn.Module,
    library: str,
    source: str | Path | None,
    kind: Kind,
    *,
    image_size: int | None = None,
    max_length: int = 128,
    pair: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Preprocessing:
    """The preprocessing that the pretrained `model` expects.

    Args:
        library: `"timm"` or `"transformers"`.
        source: Hub id or folder with the tokenizer's or image processor's files of a transformers model; None
            for an image model built from its config: then ImageNet's mean and standard deviation.
        image_size: height and width instead of the model's own.
        max_length: token limit of texts; never above what the model has positions for.
        pair: the input is a pair of texts.

    A tokenizer without padding token pads with its end-of-text token, and the model's config is told so.

    Raises:
        DataError: the model does not take this kind of input, or not this image size.
        FormatError: `source` has no usable tokenizer or image processor.
    """
    if library == "timm":
        if kind != "image":
            raise DataError(
                f"a timm model takes images; the data set holds {kind}s. Images in a table of paths are read from "
                "their folder, with a metadata.csv of file_name and label in it."
            )
        return _timm_preprocessing(model, image_size)
    config: Any = getattr(model, "config", None)
    if kind == "image":
        if getattr(model, "main_input_name", "pixel_values") != "pixel_values":
            raise DataError(f"{type(model).__name__} takes texts; the data set holds images.")
        channels = int(getattr(config, "num_channels", 3))
        if source is None:
            size = image_size or getattr(config, "image_size", None) or 224
            height, width = (size, size) if isinstance(size, int) else size
            mean, std = (
                _per_channel(ImagePreprocessing.mean, channels),
                _per_channel(ImagePreprocessing.std, channels),
            )
            return ImagePreprocessing((channels, height, width), mean=mean, std=std, as_dict=True)
        return HubImagePreprocessing(load_processor(source, image_size, revision, trust_remote_code), channels)
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise DataError(f"{type(model).__name__} takes images; the data set holds texts.")
    if source is None:
        raise DataError("texts need a tokenizer: give the Hub id or the folder that has its files.")
    tokenizer = load_tokenizer(source, revision, trust_remote_code)
    if config is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(config, "max_position_embeddings", None)
    limits = [
        max_length,
        tokenizer.model_max_length,
        *([positions] if isinstance(positions, int) and positions > 0 else []),
    ]
    return TextPreprocessing(tokenizer, int(min(limits)), pair)


def load_tokenizer(source: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or Hub id, with a padding token. Raises `FormatError` if there is none."""
    from transformers import AutoTokenizer

    tokenizer: Any = _load(AutoTokenizer, "tokenizer", source, revision, trust_remote_code)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FormatError(f"the tokenizer of {source} has neither a padding nor an end-of-text token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(
    source: str | Path,
    image_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The image processor of a folder or Hub id. Raises `FormatError` if there is none."""
    from transformers import AutoImageProcessor

    processor = _load(AutoImageProcessor, "image processor", source, revision, trust_remote_code)
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        for name in ("size", "crop_size"):
            if current := getattr(processor, name, None):
                shortest = "shortest_edge" in dict(current)
                setattr(processor, name, type(current)(**({"shortest_edge": image_size} if shortest else square)))
    return processor


def _load(auto: Any, what: str, source: str | Path, revision: str | None, trust_remote_code: bool) -> Any:
    try:
        return auto.from_pretrained(str(source), revision=revision or "main", trust_remote_code=trust_remote_code)
    except BayesifyError:
        raise
    except Exception as error:  # the libraries raise whatever the broken file leads to
        raise FormatError(f"no usable {what} in {str(source)!r}: {' '.join(str(error).split())[:300]}") from error


def _timm_preprocessing(model: nn.Module, image_size: int | None) -> ImagePreprocessing:
    from timm.data import resolve_model_data_config  # type: ignore[reportPrivateImportUsage]

    config = resolve_model_data_config(model)
    channels, *size = config["input_size"]
    embed: Any = getattr(model, "patch_embed", None)
    built = getattr(embed, "img_size", None)  # the config keeps the checkpoint's size when a model is built for another
    size = list(built or size)
    if image_size is not None:
        if built and getattr(embed, "strict_img_size", False) and tuple(built) != (image_size, image_size):
            raise DataError(f"this model takes images of {built[0]}×{built[1]} only; found image_size={image_size}.")
        size = [image_size, image_size]
    first = getattr(model, "pretrained_cfg", {}).get("first_conv")
    if isinstance(first, str):
        channels = getattr(model.get_submodule(first), "in_channels", channels)
    return ImagePreprocessing(
        (channels, *size),  # type: ignore[reportArgumentType]
        config["interpolation"],
        _per_channel(config["mean"], channels),
        _per_channel(config["std"], channels),
        config["crop_pct"],
        config["crop_mode"],
    )


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
