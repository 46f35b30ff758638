"""Where a network came from, and how to build it again: the part of the saved config about the base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bayesify.errors import BayesifyError, FormatError
from bayesify.hub.base import Base, load_base
from bayesify.hub.timm_models import RESERVED, load_timm


@dataclass(frozen=True)
class Origin:
    """How to build a base model again.

    Attributes:
        library: "timm", "transformers", or "module" for anything else, which the user must bring along.
        id: timm name, Hub id or folder of the pretrained weights; `None` where there is none.
        revision: commit of a Hub id.
        architecture: timm's name of the architecture, or the name of the transformers class.
        num_labels: size of a timm head (transformers keep it in `config`).
        model_args: further arguments of the constructor.
        config: fields of a transformers config.
    """

    library: Literal["timm", "transformers", "module"]
    id: str | None = None
    revision: str | None = None
    architecture: str | None = None
    num_labels: int | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Origin:
        """Read `to_dict`, strictly: an unknown or mistyped field is a `FormatError` naming file and field."""
        if not isinstance(values, Mapping):
            raise FormatError(f"{source}: base_model must be an object; found {type(values).__name__}.")
        kinds: dict[str, type] = {"num_labels": int, "model_args": dict, "config": dict}
        known = {f.name for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise FormatError(f"{source}: unknown field base_model.{name}.")
            if not isinstance(value, kinds.get(name, str)):
                raise FormatError(f"{source}: base_model.{name} must be a {kinds.get(name, str).__name__}.")
        if values.get("library") not in ("timm", "transformers", "module"):
            raise FormatError(f"{source}: base_model.library {values.get('library')!r} is unknown.")
        return cls(**values)

    @property
    def is_local(self) -> bool:
        """Whether the pretrained weights are in a folder of this machine."""
        return self.id is not None and (Path(self.id).is_absolute() or Path(self.id).expanduser().is_dir())


def located(id: str | Path) -> str:
    """The absolute path of a folder, so that it is found from elsewhere; any other id as it is."""
    folder = Path(id).expanduser()
    return str(folder.resolve()) if folder.is_dir() else str(id)


def origin_of(model: nn.Module, base: Base | None = None) -> Origin:
    """What a model itself says of where it came from; `base` knows more where `load_base` made it."""
    if (base is not None and base.library == "timm") or (base is None and isinstance(_timm_config(model), Mapping)):
        config = _timm_config(model) or {}
        architecture = str(config.get("architecture") or "")
        tag = config.get("tag")
        return Origin(
            library="timm",
            id=located(base.id) if base else f"{architecture}.{tag}" if tag else architecture,
            revision=base.revision if base else None,
            architecture=architecture,
            num_labels=int(getattr(model, "num_classes", 0)),
            model_args={**_timm_arguments(model), **(base.model_args if base else {})},
        )
    config = getattr(model, "config", None)
    if type(model).__module__.startswith(("transformers.", "transformers_modules.")) and config is not None:
        name = base.id if base else getattr(config, "_name_or_path", None)
        return Origin(
            library="transformers",
            id=located(name) if name else None,
            revision=base.revision if base else None,
            architecture=type(model).__name__.removeprefix("Rank1"),
            config=config.to_dict(),
        )
    return Origin(library="module", architecture=type(model).__name__)


def build(origin: Origin, *, pretrained: bool, trust_remote_code: bool = False) -> nn.Module:
    """The base model anew, with its pretrained weights or without any.

    Raises:
        BayesifyError: the weights cannot be had, or only the user can build this model.
    """
    if origin.library == "module":
        raise BayesifyError(
            f"the base model is a {origin.architecture} of your own; build it and pass it as base_model=."
        )
    if origin.library == "timm":
        return _build_timm(origin, pretrained)
    return _build_transformers(origin, pretrained, trust_remote_code)


def _build_timm(origin: Origin, pretrained: bool) -> nn.Module:
    import timm

    if pretrained and origin.num_labels:
        return load_base(
            origin.id or "",
            num_labels=origin.num_labels,
            revision=origin.revision,
            model_args=origin.model_args,
        ).model
    if pretrained:
        raise BayesifyError(f"the base model {origin.id} has no classification head.")
    name = origin.architecture or ""
    if not timm.is_model(name):
        raise FormatError(f"base_model.architecture {name!r} is no model of timm.")
    if reserved := sorted(origin.model_args.keys() & set(RESERVED)):
        raise FormatError(f"base_model.model_args must not hold {reserved[0]}.")
    return load_timm(name, name, origin.num_labels, False, origin.model_args, None)[0].eval()


def _timm_arguments(model: nn.Module) -> dict[str, Any]:
    """The arguments timm built the model with, as far as it remembers them and JSON can hold them."""
    arguments: Mapping[str, Any] = getattr(model, "_model_args", None) or {}
    kept = {}
    for name, value in arguments.items():
        try:
            kept[name] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return {name: value for name, value in kept.items() if name not in RESERVED}


def _build_transformers(origin: Origin, pretrained: bool, trust_remote_code: bool) -> nn.Module:
    import transformers

    from bayesify.hub.loading import brief, not_downloaded, quiet

    cls = getattr(transformers, origin.architecture or "", None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        if trust_remote_code and origin.id:
            return load_base(
                origin.id,
                label_names=_labels(origin.config or {}),
                revision=origin.revision,
                trust_remote_code=True,
                pretrained=pretrained,
            ).model
        raise FormatError(f"base_model.architecture {origin.architecture!r} is no model class of transformers.")
    try:
        values = dict(origin.config or {})
        config = transformers.AutoConfig.for_model(values.pop("model_type", ""), **values)
    except Exception as error:
        raise FormatError(f"base_model.config is not usable: {brief(error)}") from error
    with quiet():
        if not pretrained:
            return cls(config).eval()
        try:
            return cls.from_pretrained(
                origin.id,
                revision=origin.revision or "main",
                config=config,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
            ).eval()
        except Exception as error:
            raise not_downloaded(str(origin.id), error) from error


def _labels(config: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes in a transformers config."""
    names = config.get("id2label") or {}
    return [names[number] for number in sorted(names, key=int)] or None


def _timm_config(model: nn.Module) -> Mapping[str, Any] | None:
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) and type(model).__module__.startswith(("timm.", "bayesify.")) else None
