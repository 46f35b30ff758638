"""Networks of transformers: from the Hub or from a folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from bayesify.errors import BayesifyError, ConfigError, FormatError
from bayesify.hub.loading import brief, not_downloaded, quiet


def load_transformers(
    id: str,
    source: str,
    count: int | None,
    names: list[str] | None,
    revision: str | None,
    trust_remote_code: bool,
    pretrained: bool,
    arguments: dict[str, Any],
) -> tuple[nn.Module, list[str], list[str]]:
    """The classifier of a Hub id or folder `source`, the names of its labels and of its new parameters."""
    from transformers import AutoConfig

    shared: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with quiet(), _broken(id):
        config = AutoConfig.from_pretrained(source, **shared)
    if unknown := sorted(key for key in arguments if key not in config.to_dict()):
        near = difflib.get_close_matches(unknown[0], config.to_dict(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"model_args: {unknown[0]!r} is no field of {type(config).__name__}.{hint}")
    config.update(arguments)
    if count is not None:
        labels = names or (None if count == config.num_labels else [str(label) for label in range(count)])
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: number for number, label in enumerate(labels)}
    auto = _auto_class(config, id)
    with quiet(), _broken(id):
        if pretrained:
            model, info = auto.from_pretrained(
                source,
                config=config,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                output_loading_info=True,
                **shared,
            )
            mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
            new = set(info["missing_keys"]) | set(mismatched)
        else:
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
            new = {name for name, _ in model.named_parameters()}
    if not {"dtype", "torch_dtype"} & arguments.keys() and not getattr(model, "is_quantized", False):
        model.float()  # weights stored in halves would be trained in halves, where small steps are lost
    found = [str(model.config.id2label[label]) for label in sorted(model.config.id2label)]
    ordered = [name for name, _ in model.named_parameters() if name in new]
    return model, found, ordered


def _auto_class(config: Any, id: str) -> Any:
    """The auto class that classifies with this architecture: images or texts."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    autos = [AutoModelForSequenceClassification, AutoModelForImageClassification]
    mapped = [
        auto
        for auto in autos
        if type(config) in auto._model_mapping or auto.__name__ in (getattr(config, "auto_map", None) or {})
    ]
    if not mapped:
        raise BayesifyError(
            f"{id}: transformers has no classifier of images or texts for model type {config.model_type!r}."
        )
    images = any("Image" in architecture for architecture in config.architectures or [])
    return mapped[-1] if images else mapped[0]


@contextmanager
def _broken(id: str) -> Iterator[None]:
    """Turn the many errors of a broken or unreachable transformers model into ours."""
    try:
        yield
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise BayesifyError(f"{id} brings its own code; pass trust_remote_code=True if you trust it.") from error
        if isinstance(error, OSError) and not Path(id).expanduser().is_dir():
            raise not_downloaded(id, error) from error
        raise FormatError(f"{id} is not a usable transformers model: {brief(error)}") from error
