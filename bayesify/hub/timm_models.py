"""Networks of timm: by name, from the Hub or from a folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bayesify.errors import BayesifyError, ConfigError, FormatError
from bayesify.hub.loading import brief, not_downloaded, quiet

# These arguments of `timm.create_model` choose what is loaded, which a saved config must not do.
RESERVED = (
    "model_name",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "checkpoint_path",
    "cache_dir",
    "num_classes",
    "scriptable",
    "exportable",
    "no_jit",
)
HUB_WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")


def save_timm_folder(model: nn.Module, folder: str | Path, label_names: Sequence[str] | None = None) -> None:
    """Write a timm model as a folder that `load_base` reads: `config.json` and `model.safetensors`.

    Raises:
        ConfigError: `model` was not made by `timm.create_model`.
    """
    from timm.models import save_for_hf

    if not getattr(model, "pretrained_cfg", None):
        raise ConfigError(f"{type(model).__name__} has no pretrained_cfg; only models made by timm can be written so.")
    config = {"label_names": list(label_names)} if label_names is not None else None
    save_for_hf(model, str(folder), model_config=config, safe_serialization=True)


def load_timm(
    id: str, source: str, count: int | None, pretrained: bool, arguments: dict[str, Any], folder: Path | None
) -> tuple[nn.Module, list[str], list[str]]:
    """The model of a timm `source`, the names of its labels and of its new parameters."""
    import timm

    options = dict(arguments) if count is None else {**arguments, "num_classes": count}
    try:
        with quiet():
            model = timm.create_model(source, pretrained=pretrained, **options)
    except Exception as error:  # a broken config or checkpoint raises whatever it leads timm to
        if isinstance(error, TypeError) and arguments:
            raise ConfigError(f"{id} does not take these model_args: {brief(error)}") from error
        if folder is not None:
            raise FormatError(f"{folder} is not a usable timm model: {brief(error)}") from error
        if isinstance(error, OSError):
            raise not_downloaded(id, error) from error
        raise BayesifyError(f"timm could not load {id!r}: {brief(error)}") from error
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[reportAssignmentType]
    classes = int(getattr(model, "num_classes", 0))
    new = [name for name, _ in model.named_parameters()]
    if pretrained:
        heads = config.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        replaced = classes != config.get("num_classes")
        new = [name for name in new if replaced and name.rpartition(".")[0] in heads]
        if folder is not None:
            _check_complete(model, folder, set(new))
        _restart_heads(model, new)
    known = config.get("label_names") if classes == config.get("num_classes") else None
    if isinstance(known, dict):
        known = list(known.values())
    if not known or len(known) != classes:
        known = [str(label) for label in range(classes)]
    return model, list(known), new


def _restart_heads(model: nn.Module, new: list[str]) -> None:
    """Draw new heads as PyTorch draws a layer, by its number of inputs.

    timm's own start is made for training from scratch: ±1 / sqrt(classes) in EfficientNets gives logits a standard
    deviation of 13 on pretrained features, and a fine-tune of a few hundred steps does not recover from it.
    """
    for name in sorted({name.rpartition(".")[0] for name in new}):
        if isinstance(head := model.get_submodule(name), (nn.Linear, nn.Conv2d)):
            head.reset_parameters()


def check_hub_weights(id: str, revision: str) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for name in HUB_WEIGHTS:
        try:
            hf_hub_download(id, name, revision=revision)
            return
        except LocalEntryNotFoundError as error:
            raise not_downloaded(id, error) from error
        except EntryNotFoundError:
            continue
        except Exception as error:
            raise not_downloaded(id, error) from error
    raise FormatError(f"{id} has no model.safetensors; weights are never read from pickle files.")


def check_name(name: str) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    tagged = [known for known in timm.list_pretrained() if known.startswith(f"{architecture}.")]
    if timm.is_model(architecture) and (not tag or name in tagged):
        return
    candidates = tagged or timm.list_models()
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.0 if tagged else 0.6)
    hint = f" Did you mean {', '.join(near)}?" if near else " timm.list_models() lists them."
    raise BayesifyError(f"{name!r} is neither a folder nor a model of timm.{hint} A Hub id reads owner/name.")


def _check_complete(model: nn.Module, folder: Path, new: set[str]) -> None:
    """A checkpoint must have all names of the model but the head's: with a new head timm does not check."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    state = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    renamed = not stored <= set(model.state_dict())  # by timm while loading: then the names say nothing
    if not renamed and (missing := sorted(state - stored - new)):
        raise FormatError(f"{folder / 'model.safetensors'} is incomplete: {missing[0]} is missing.")
