"""Write a Bayesian model to a folder: a JSON config, one safetensors file and a model card."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bayesify
from bayesify.errors import BayesifyError
from bayesify.files import CONFIG_FILE, SAVING, WEIGHTS_FILE, check_output
from bayesify.graph import is_quantized
from bayesify.hub.card import write_card
from bayesify.hub.origin import Origin, build, origin_of
from bayesify.layers import Rewritten, original_class

if TYPE_CHECKING:
    from bayesify.model import BayesianModel

FORMAT_VERSION = 1
SCORES = "conformal.scores"
"""Name of the scores of `fit_sets` among the weights."""
_READABLE = 0o666
_OF_TRAINING = re.compile(r"(, )?(inplace|momentum)=[^,]*")


def save_pretrained(
    model: BayesianModel, folder: str | Path, *, full: bool = False, fused: Mapping[str, Any] | None = None
) -> Path:
    """Write `bayesify_config.json`, `bayesify.safetensors` and `README.md`; `from_pretrained` reads them.

    The weights file holds the factors and every slow weight that differs from the base model's: trained weights, a new
    head, statistics of normalization layers. With `full`, or where the base model cannot be loaded again to compare
    with, it holds all slow weights (but not those in low-bit storage, which safetensors cannot hold: they are never
    trained, and the base model brings them). Files of an earlier save are replaced; the folder's other contents stay.

    A network of timm or transformers that was changed after it was built, or built with arguments that JSON cannot
    hold, is recorded as one of your own, with a warning.

    With `fused`, options of `BayesianModel.fuse`, `from_pretrained` fuses what it reads.

    Raises:
        FormatError: the folder holds something that bayesify did not write.
        BayesifyError: the network was changed after its conversion, so that what is written could not be read.
    """
    folder = check_output(folder)
    _check_sites(model)
    origin = model.origin or origin_of(model.model)
    state = _unshared({name: value for name, value in model.model.state_dict().items() if not is_quantized(value)})
    network = None if full else _base(origin)
    if (name := _difference(model.model, _skeleton(origin) if network is None else network)) is not None:
        warnings.warn(
            f"{name!r} is not what {origin.library} builds from the name and arguments on record, so the network is "
            "saved as one of your own, with all weights: to load it, build it and give it as base_model=.",
            stacklevel=2,
        )
        origin, network = Origin(library="module", architecture=type(model.model).__name__), None
    base = None if network is None else network.state_dict()
    kept = {name: value for name, value in state.items() if base is None or not _same(value, base.get(name))}
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "bayesify_version": bayesify.__version__,
        "base_model": origin.to_dict(),
        "weights": "full" if base is None else "changed",
        "rank1": model.config.non_defaults(),
        "sites": {name: model.report.batch_dims.get(name, 0) for name in model.report.converted},
        "task": model.task,
        "labels": list(model.label_names),
        "preprocessing": None if model.preprocessing is None else model.preprocessing.to_dict(),
        "temperature": model.temperature,
        "conformal": None,
    }
    if model.conformal is not None:
        kept[SCORES] = model.conformal.scores.cpu()
        config["conformal"] = {"penalty": model.conformal.penalty, "samples": model.conformal.samples}
    if fused is not None:
        config["fused"] = dict(fused)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{SAVING}{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process: in a container, numbers repeat
    temporary.mkdir()
    try:
        save_file(kept, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        if model.preprocessing is not None:
            model.preprocessing.save(temporary)
        generation: Any = getattr(model.model, "generation_config", None)
        if hasattr(generation, "save_pretrained"):
            generation.save_pretrained(temporary)
        write_card(temporary / "README.md", model, origin, folder)
        # The config goes last, and that of an earlier save first: a reader that finds one finds what belongs to it.
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda p: p.name == CONFIG_FILE):
            target = folder / path.name
            if path.is_dir():  # some tokenizers have a folder of templates
                shutil.rmtree(target, ignore_errors=True)
            else:
                path.chmod(_READABLE & ~_umask())
            os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_sites(model: BayesianModel) -> None:
    there = {name for name, _, _ in model.factors()}
    if lost := sorted(set(model.report.converted) ^ there):
        raise BayesifyError(
            f"the network is not the one that was converted: {lost[0]} has lost its factors, or has another name. "
            "Adapters and new heads go into the network before the conversion; save an adapted one as its library does."
        )


def _umask() -> int:
    """The permissions that new files do not get; safetensors gives them to the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _base(origin: Origin) -> nn.Module | None:
    """The base model anew, with its weights; `None` where it is not to be had."""
    if origin.id is None or origin.library == "module":
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            # A new head must differ from this one even if it was made under the same seed.
            torch.default_generator.seed()
            return build(origin, pretrained=True)
    except BayesifyError:
        return None  # then all weights are written


def _skeleton(origin: Origin) -> nn.Module | None:
    """The base model anew, without weights; `None` where that cannot be built so."""
    if origin.library == "module":
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return build(origin, pretrained=False)
    except Exception:  # code that looks at values fails in its own way
        return None


def _difference(network: nn.Module, base: nn.Module | None) -> str | None:
    """The first layer or weight in which a converted network is not its base model built anew."""
    layers, state = dict(network.named_modules()), network.state_dict()
    if base is None or any(map(is_quantized, state.values())):
        return None
    for name, layer in base.named_modules():
        if name and (name not in layers or not _alike(layers[name], layer)):
            return name
    shapes = ((name, value.shape) for name, value in base.state_dict().items())
    return next((name for name, shape in shapes if name not in state or state[name].shape != shape), None)


def _alike(layer: nn.Module, base: nn.Module) -> bool:
    """Whether a layer computes in evaluation what that of the base model does, as far as class and settings tell."""
    rewritten = isinstance(layer, Rewritten)
    cls = original_class(type(layer)) if rewritten else type(layer)
    if isinstance(layer, nn.SyncBatchNorm) or cls.__module__.startswith("bayesify."):
        return True
    if (cls.__module__, cls.__qualname__) != (type(base).__module__, type(base).__qualname__):
        return False
    if rewritten or "Drop" in cls.__name__ or next(base.children(), None) is not None:
        return True
    found, expected = (_OF_TRAINING.sub("", one.extra_repr()) for one in (layer, base))
    return found == expected


def _same(value: Tensor, other: Tensor | None) -> bool:
    return (
        other is not None
        and value.dtype == other.dtype
        and value.shape == other.shape
        and torch.equal(value, other.to(value.device))
    )


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name for tied tensors, all on the CPU: safetensors holds no shared memory, and loading ties them again."""
    seen: set[tuple[int, torch.Size]] = set()
    kept: dict[str, Tensor] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape)
        if value.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = value.detach().cpu().contiguous()
    return kept
