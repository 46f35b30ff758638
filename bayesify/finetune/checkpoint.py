"""Checkpoints without pickle: tensors as safetensors, everything else as JSON, written whole or not at all."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bayesify.errors import FormatError

FORMAT = 1


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that trains and every buffer, by name: what training can have changed."""
    parameters = dict(model.named_parameters())
    state = model.state_dict()
    return {n: t for n, t in state.items() if n not in parameters or parameters[n].requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Put a `trained_state` back, after checking every name and shape."""
    own = model.state_dict()
    expected = trained_state(model)
    missing, foreign = sorted(set(expected) - set(state)), sorted(set(state) - set(own))
    if missing or foreign:
        raise FormatError(
            f"{source}: does not belong to this model and these options (missing {missing[:3]}, unknown {foreign[:3]})."
        )
    for name, value in state.items():
        if value.shape != own[name].shape:
            raise FormatError(f"{source}: {name} has shape {tuple(value.shape)}; expected {tuple(own[name].shape)}.")
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any], best: dict[str, Tensor]
) -> None:
    """Write a checkpoint folder in one move, replacing the one before."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    _save_tensors(temporary / "model.safetensors", trained_state(model))
    _save_tensors(temporary / "optimizer.safetensors", tensors)
    _save_tensors(temporary / "best.safetensors", best)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    content = {"format": FORMAT, "progress": progress, "groups": groups, "scalars": scalars}
    (temporary / "checkpoint.json").write_text(json.dumps(content, indent=1))
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore model and optimizer; returns the progress and the best state. Raises `FormatError` on a bad folder."""
    if not folder.exists() and folder.with_name(f".{folder.name}.old").exists():
        folder = folder.with_name(f".{folder.name}.old")  # interrupted between the two moves of a save
    content = _read_json(folder / "checkpoint.json")
    if content.get("format") != FORMAT:
        raise FormatError(f"{folder / 'checkpoint.json'}: format {content.get('format')!r}; expected {FORMAT}.")
    model_state = read_tensors(folder / "model.safetensors")
    best = read_tensors(folder / "best.safetensors")
    state: dict[int, dict[str, Any]] = {}
    for name, value in read_tensors(folder / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    for index, entries in content["scalars"].items():
        state.setdefault(int(index), {}).update(entries)
    current = optimizer.state_dict()["param_groups"]
    if len(current) != len(content["groups"]):
        raise FormatError(f"{folder}: has {len(content['groups'])} parameter groups; expected {len(current)}.")
    groups = [{**saved, "params": group["params"]} for saved, group in zip(content["groups"], current, strict=True)]
    for saved in groups:
        if "betas" in saved:
            saved["betas"] = tuple(saved["betas"])
    load_trained_state(model, model_state, str(folder / "model.safetensors"))
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return content["progress"], best


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators as JSON."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],  # type: ignore[union-attr]
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([torch.tensor(s, dtype=torch.uint8) for s in state["cuda"]])


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or a `FormatError` naming it."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise FormatError(f"{path}: not found.") from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: truncated or not a safetensors file ({error}).") from error


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # Tied parameters share memory, which safetensors refuses: each name gets its own copy.
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FormatError(f"{path}: not found; there is no checkpoint to resume from.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: truncated or not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: expected a JSON object; found {type(content).__name__}.")
    return content
