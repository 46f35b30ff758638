"""Loading the pretrained network that is to become Bayesian: from timm, the Hugging Face Hub or a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bayesify.errors import BayesifyError, ConfigError, FormatError
from bayesify.hub.loading import not_downloaded, read_json
from bayesify.hub.timm_models import RESERVED, check_hub_weights, check_name, load_timm, save_timm_folder
from bayesify.hub.transformers_models import load_transformers

Library = Literal["timm", "transformers"]

__all__ = ["Base", "load_base", "save_timm_folder"]


@dataclass(frozen=True)
class Base:
    """A pretrained network and what is needed to build it again.

    `load_base(id, label_names=label_names, revision=revision, model_args=model_args)` gives the same
    architecture.

    Args:
        model: the network, in eval mode.
        library: where it comes from.
        id: timm name, Hub id or folder, as given to `load_base`.
        revision: commit of the Hub repository where known.
        model_args: the arguments given beside the number of labels, e.g. `{"img_size": 64}`; JSON values.
        label_names: one name a class.
        new_parameters: names of parameters that the checkpoint did not hold, usually a new head; all of them
            with `pretrained=False`.
    """

    model: nn.Module
    library: Library
    id: str
    revision: str | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] = field(default_factory=list)
    new_parameters: list[str] = field(default_factory=list)

    @property
    def new_layers(self) -> tuple[str, ...]:
        """The linear layers that the checkpoint did not hold, for `Rank1Config.new_layers`; none if it held nothing."""
        if len(self.new_parameters) == len(list(self.model.parameters())):
            return ()
        new = {name.removesuffix(".weight") for name in self.new_parameters}
        return tuple(name for name, layer in self.model.named_modules() if name in new and isinstance(layer, nn.Linear))


def load_base(
    model: str | Path,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    pretrained: bool = True,
    model_args: dict[str, Any] | None = None,
) -> Base:
    """Load a pretrained classifier; a head of another size than asked for is replaced by a new one.

    Args:
        model: a timm name (`resnet50`, `resnet50.a1_in1k`), a Hub id (`timm/resnet50.a1_in1k`,
            `google-bert/bert-base-uncased`) or a folder of timm or transformers. Existing folders come first.
        num_labels, label_names: the classes; by default those of the checkpoint.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run model code that a Hub repository or folder brings along.
        pretrained: False builds the architecture with random weights.
        model_args: more arguments for `timm.create_model`, or fields of the transformers config.

    Weights are read from safetensors, never from pickle (plain timm names: from where timm keeps them). Those of
    transformers models become float32, unless model_args has a dtype.

    Raises:
        BayesifyError: the name is unknown, or its weights cannot be downloaded.
        FormatError: a folder or repository is not a model, or its files are broken.
        ConfigError: the options have no meaning, alone or together.
    """
    name = re.sub(r"^hf[-_]hub:", "", str(model).strip())
    names = list(label_names) if label_names is not None else None
    if names is not None and num_labels is not None and len(names) != num_labels:
        raise ConfigError(f"num_labels={num_labels}, but label_names has {len(names)} names.")
    count = len(names) if names is not None else num_labels
    if count is not None and count < 1:
        raise ConfigError(f"a classifier needs at least 1 label; found {count}.")
    arguments = dict(model_args or {})
    if reserved := sorted(arguments.keys() & set(RESERVED)):
        raise ConfigError(f"model_args must not hold {', '.join(reserved)}; use the options of load_base.")

    folder = Path(name).expanduser()
    place = folder if folder.is_dir() else None
    if place is not None:
        if revision is not None:
            raise ConfigError(f"revision={revision!r} is for Hub ids; {name} is a folder.")
        library, source = _folder_library(place, pretrained), str(place)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        config, revision = _hub_config(name, revision)
        library, source = ("timm" if "architecture" in config else "transformers"), name
        if library == "timm" and pretrained:
            check_hub_weights(name, revision)
    elif re.search(r"[/\\~]", name) or name.startswith("."):
        raise BayesifyError(f"{name!r} is no folder, and no Hub id (owner/name) either.")
    elif revision is not None:
        raise ConfigError(f"revision={revision!r} is for Hub ids; {name!r} is not one. Try timm/{name}.")
    else:
        check_name(name)
        library, source = "timm", name

    if library == "timm":
        if place is not None:
            source = f"local-dir:{place}"
        elif revision is not None:
            source = f"hf-hub:{name}@{revision}"
        network, known, new = load_timm(name, source, count, pretrained, arguments, place)
    else:
        network, known, new = load_transformers(
            name, source, count, names, revision, trust_remote_code, pretrained, arguments
        )
    return Base(network.eval(), library, name, revision, arguments, names or known, new)


def _folder_library(folder: Path, pretrained: bool) -> Library:
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    if "architecture" not in config and "model_type" not in config:
        found = "has neither model_type (transformers) nor architecture (timm)" if config else "is missing"
        raise FormatError(f"{folder} is not a model folder: config.json {found}.")
    if "architecture" not in config:
        return "transformers"
    if pretrained and not (folder / "model.safetensors").is_file():
        raise FormatError(f"{folder} has no model.safetensors; weights are never read from pickle files.")
    return "timm"


def _hub_config(id: str, revision: str | None) -> tuple[dict[str, Any], str]:
    """config.json of a Hub repository and the commit it is of."""
    from huggingface_hub import hf_hub_download

    try:
        file = Path(hf_hub_download(id, "config.json", revision=revision))
    except Exception as error:  # http libraries, proxies and caches each have their own errors
        raise not_downloaded(id, error) from error
    return read_json(file), file.parent.name
