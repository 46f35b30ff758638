"""What can be generated from several networks at once; everything else is refused before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from bayesify.errors import BayesifyError, DataError

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

_MIXIN: Any = GenerationMixin
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
_IMAGES = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")


def check_supported(
    bnn: BayesianModel, generation_config: GenerationConfig | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """The generation config in force, after a check of model, config and options.

    Raises:
        BayesifyError: the model has no `generate`, or one of its own.
        DataError: what the config or the options ask for is not supported with several networks.
    """
    model: Any = bnn.model
    _check_model(model)
    config, _ = model._prepare_generation_config(generation_config, **options)
    for found, why in _problems(model, config, options):
        if found:
            raise DataError(f"{why} is not supported with several networks; leave it out.")
    if config.use_cache is not False:
        _check_cached_steps(bnn, model)
    return config


def _check_model(model: Any) -> None:
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise BayesifyError(
            f"{name} wraps the network that generates text: convert that one, peft_model.get_base_model(), which has "
            "the adapters in it."
        )
    if not isinstance(model, _MIXIN) or not model.can_generate():
        raise BayesifyError(
            f"{name} cannot generate text; expected a transformers model with a language modeling head, such as those "
            "of AutoModelForCausalLM and AutoModelForSeq2SeqLM."
        )
    if type(model).generate is not _MIXIN.generate or "generate" in vars(model):
        raise BayesifyError(
            f"{name} has a `generate` of its own, which calls its parts in ways that bayesify cannot follow; "
            "only models that use the one of transformers.GenerationMixin are supported."
        )


def _check_cached_steps(bnn: BayesianModel, model: Any) -> None:
    """Refuse what would go wrong after the first pass, when only the last token is computed."""
    if not model._supports_default_dynamic_cache():
        raise DataError(f"{type(model).__name__} keeps a cache that is no transformers.Cache; pass use_cache=False.")
    over_time = [name for name, layer in bnn.layers() if isinstance(layer, nn.Conv1d)]
    if over_time and not model.config.is_encoder_decoder:
        raise DataError(
            f"the convolution {over_time[0]} carries factors, but may be computed from its weight alone where states "
            "are kept from token to token. Pass use_cache=False, or leave such layers out of the conversion with "
            "exclude=."
        )


def _problems(model: Any, config: GenerationConfig, options: Mapping[str, Any]) -> list[tuple[bool, str]]:
    mode = config.get_generation_mode(options.get("assistant_model"))
    cache = config.cache_implementation
    images_first = "mm_encoder_outputs" in inspect.signature(model.forward).parameters
    return [
        (mode not in _MODES, f"{str(mode.value).replace('_', ' ')} (greedy search, sampling and beam search are)"),
        (options.get("custom_generate") is not None, "custom_generate"),
        (config.guidance_scale not in (None, 1), f"guidance_scale={config.guidance_scale}"),
        (options.get("negative_prompt_ids") is not None, "negative_prompt_ids"),
        (bool(config.token_healing), "token_healing"),
        (cache == "paged", "cache_implementation='paged'"),
        (
            "static" in str(cache) and config.prefill_chunk_size is not None,
            f"prefill_chunk_size with cache_implementation={cache!r}",
        ),
        (options.get("encoder_outputs") is not None, "encoder_outputs (each network has its own)"),
        (images_first and any(options.get(key) is not None for key in _IMAGES), "an image, which is encoded apart,"),
    ]
