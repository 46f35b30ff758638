"""Read a Bayesian model from a folder or from the Hugging Face Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bayesify.config import Rank1Config
from bayesify.errors import BayesifyError, ConversionError, FormatError
from bayesify.files import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE, read_json, read_tensors
from bayesify.graph import is_quantized
from bayesify.hub.base import load_base
from bayesify.hub.origin import Origin, build, located
from bayesify.hub.save import FORMAT_VERSION, SCORES
from bayesify.tasks import TASKS

if TYPE_CHECKING:
    from bayesify.calibration import Conformal
    from bayesify.fused import FusedModel
    from bayesify.model import BayesianModel

_FIELDS = {
    "format_version", "bayesify_version", "base_model", "weights", "rank1", "sites", "task", "labels", "preprocessing",
    "fused", "temperature", "conformal",
}  # fmt: skip
_FUSED = {"samples": (int, type(None)), "seed": (int, type(None)), "weights": (str, type(None))}
"""The types of what the field `fused`, which is optional, may hold: options of `BayesianModel.fuse`."""
_DOWNLOADED = ["*.json", "*.safetensors", "README.md", *TOKENIZER_FILES]


def from_pretrained(
    source: str | Path,
    *,
    base_model: nn.Module | str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> BayesianModel | FusedModel:
    """Load what `save_pretrained` wrote, in eval mode: a Bayesian model, or a fused one if such a one was saved.

    Args:
        source: a folder, or a Hub id.
        base_model: the pretrained network itself (it is converted in place), or the name, id or folder to load
            it from; needed where the one on record cannot be downloaded or is a module of your own.
        revision: branch, tag or commit of a Hub id.
        trust_remote_code: run model code that the base model's repository brings along.

    Raises:
        FormatError: a file is missing, truncated, foreign, newer than this version, or does not fit the base model.
        BayesifyError: the base model cannot be had.
    """
    folder = _folder(source, revision)
    bnn = load_bayesian(folder, base_model=base_model, trust_remote_code=trust_remote_code)
    fused = read_config(folder / CONFIG_FILE)["fused"]
    if fused is None:
        return bnn
    bnn.report.unsettled = False  # it was fused before, which takes that to be known
    return bnn.fuse(**fused)


def load_bayesian(
    source: str | Path,
    *,
    base_model: nn.Module | str | Path | None = None,
    trust_remote_code: bool = False,
) -> BayesianModel:
    """As `from_pretrained`, but always the Bayesian model, of a fused one that which was fused."""
    folder = _folder(source, None)
    config = read_config(folder / CONFIG_FILE)
    state = read_tensors(folder / WEIGHTS_FILE)
    origin = config["base_model"]
    preprocessing = None
    if config["preprocessing"] is not None:
        from bayesify.data import preprocessing_from_dict

        try:
            preprocessing = preprocessing_from_dict(config["preprocessing"], folder)
        except FormatError as error:
            raise FormatError(f"{folder / CONFIG_FILE}: {error}") from error
    conformal = _conformal(config["conformal"], state, folder)
    model = _network(origin, base_model, config["weights"] == "full", trust_remote_code, folder)
    if not isinstance(base_model, nn.Module):
        _take_dtypes(model, state)
    bnn = _convert(model, config, state, folder)
    bnn.origin = origin if not isinstance(base_model, (str, Path)) else replace(origin, id=located(base_model))
    bnn.label_names = config["labels"]
    bnn.preprocessing = preprocessing
    bnn.temperature, bnn.conformal = float(config["temperature"]), conformal
    if (folder / "generation_config.json").exists() and hasattr(bnn.model, "generation_config"):
        from transformers import GenerationConfig

        bnn.generation_config = GenerationConfig.from_pretrained(str(folder))
    return bnn.eval()


def read_config(path: Path) -> dict[str, Any]:
    """The checked content of `bayesify_config.json`, with `base_model` and `rank1` as objects."""
    content = read_json(path, missing="expected a folder written by save_pretrained")
    version = content.get("format_version")
    if not isinstance(version, int):
        raise FormatError(f"{path}: field format_version is missing; this is no bayesify config.")
    if version > FORMAT_VERSION:
        raise FormatError(f"{path}: format_version {version} is newer than {FORMAT_VERSION}; update bayesify.")
    for name, default in (("fused", None), ("temperature", 1.0), ("conformal", None)):
        content.setdefault(name, default)
    if wrong := sorted(set(content) ^ _FIELDS):
        problem = "unknown" if wrong[0] in content else "missing"
        raise FormatError(f"{path}: field {wrong[0]} is {problem}.")
    if content["weights"] not in ("full", "changed"):
        raise FormatError(f"{path}: field weights must be 'full' or 'changed'; found {content['weights']!r}.")
    if content["task"] is not None and content["task"] not in TASKS:
        raise FormatError(f"{path}: field task {content['task']!r} is unknown.")
    labels = content["labels"]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise FormatError(f"{path}: field labels must be a list of names.")
    if not isinstance(content["rank1"], Mapping):
        raise FormatError(f"{path}: field rank1 must be an object.")
    sites = content["sites"]
    if not isinstance(sites, dict) or not all(dim in (0, 1, 2, 3) for dim in sites.values()):
        raise FormatError(f"{path}: field sites must map names to the dimension of their inputs that is the batch.")
    fused = content["fused"]
    if fused is not None and not (
        isinstance(fused, dict) and all(type(value) in _FUSED.get(name, ()) for name, value in fused.items())
    ):
        raise FormatError(f"{path}: field fused must hold options of fuse: {', '.join(_FUSED)}; found {fused!r}.")
    temperature, conformal = content["temperature"], content["conformal"]
    if type(temperature) not in (int, float) or not 0.0 < temperature < math.inf:
        raise FormatError(f"{path}: field temperature must be positive; found {temperature!r}.")
    if conformal is not None and not (
        isinstance(conformal, dict)
        and set(conformal) == {"penalty", "samples"}
        and type(conformal["penalty"]) in (int, float)
        and type(conformal["samples"]) in (int, type(None))
    ):
        raise FormatError(f"{path}: field conformal must hold penalty and samples; found {conformal!r}.")
    content["rank1"] = Rank1Config.from_dict(content["rank1"], source=f"{path}: rank1")
    content["base_model"] = Origin.from_dict(content["base_model"], str(path))
    return content


def _folder(source: str | Path, revision: str | None) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    from bayesify.hub.loading import not_downloaded

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=_DOWNLOADED))
    except HFValidationError as error:
        raise FormatError(f"{source} is neither a folder nor a Hub id (owner/name).") from error
    except Exception as error:  # http libraries, proxies and caches each have their own errors
        raise not_downloaded(str(source), error) from error


def _conformal(options: dict[str, Any] | None, state: dict[str, Tensor], folder: Path) -> Conformal | None:
    """The calibration of sets, whose scores are taken out of the state."""
    from bayesify.calibration import Conformal

    scores = state.pop(SCORES, None)
    if options is None and scores is None:
        return None
    if options is None or scores is None:
        raise FormatError(f"{folder / WEIGHTS_FILE}: {SCORES} and field conformal of the config go together.")
    try:
        return Conformal(scores, float(options["penalty"]), options["samples"])
    except BayesifyError as error:
        raise FormatError(f"{folder / WEIGHTS_FILE}: {SCORES}: {error}") from error


def _network(
    origin: Origin, base_model: nn.Module | str | Path | None, full: bool, trust_remote_code: bool, folder: Path
) -> nn.Module:
    if isinstance(base_model, nn.Module):
        return base_model
    if base_model is not None:
        if origin.library == "module":
            raise BayesifyError("the base model is a module of your own; pass the module itself as base_model=.")
        origin = replace(origin, id=str(base_model), revision=None)
    try:
        with torch.random.fork_rng(devices=[]):
            return build(origin, pretrained=not full, trust_remote_code=trust_remote_code)
    except FormatError as error:
        raise FormatError(f"{folder / CONFIG_FILE}: {error}") from error
    except BayesifyError as error:
        raise BayesifyError(f"{error} Or give the base model of {folder} as base_model=.") from error


def _take_dtypes(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Parameters of a network that was built anew get the dtypes of what is to fill them."""
    for name, parameter in model.named_parameters():
        saved = state.get(name)
        if saved is not None and saved.is_floating_point() and parameter.is_floating_point():
            parameter.data = parameter.data.to(saved.dtype)


def _convert(model: nn.Module, config: dict[str, Any], state: dict[str, Tensor], folder: Path) -> BayesianModel:
    """Convert and fill in; on a misfit the given model is put back as it was."""
    from bayesify.convert import rebuild

    path = folder / WEIGHTS_FILE
    try:
        with torch.random.fork_rng(devices=[]):
            bnn = rebuild(model, config["rank1"], config["sites"], task=config["task"])
    except ConversionError as error:
        raise FormatError(f"{folder / CONFIG_FILE}: does not fit the base model: {error}") from error
    try:
        own = {name: value for name, value in bnn.model.state_dict().items() if not is_quantized(value)}
        factors = {name for name in own if ".rank1." in f".{name}"}
        needed = own.keys() if config["weights"] == "full" else factors
        stored = {own[name].data_ptr() for name in state if name in own}
        missing = sorted(n for n in needed if n not in state and not (own[n].numel() and own[n].data_ptr() in stored))
        foreign = sorted(set(state) - set(own))
        if missing or foreign:
            name = missing[0] if missing else foreign[0]
            raise FormatError(f"{path}: {name} is {'missing' if missing else 'unknown to the base model'}.")
        for name, value in state.items():
            if value.shape != own[name].shape:
                raise FormatError(
                    f"{path}: {name} has shape {tuple(value.shape)}; the base model needs {tuple(own[name].shape)}."
                )
    except FormatError:
        bnn.unload()
        raise
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)
    return bnn


def load_model(source: str | Path, *, trust_remote_code: bool = False, **options: Any) -> tuple[nn.Module, Any]:
    """A saved Bayesian model, or a base model with its `Base`: what the command line means by MODEL."""
    if _is_bayesian(source):
        return load_bayesian(source, trust_remote_code=trust_remote_code), None
    base = load_base(source, trust_remote_code=trust_remote_code, **options)
    return base.model, base


def _is_bayesian(source: str | Path) -> bool:
    folder = Path(source).expanduser()
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        return (folder / CONFIG_FILE).is_file()
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(str(source), CONFIG_FILE)
    except Exception:  # no such file, or no connection: then loading it as a base model says what is wrong
        return False
    return True
