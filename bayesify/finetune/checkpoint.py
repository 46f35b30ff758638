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
from safetensors.torch import save_file
from torch import Tensor, nn

from bayesify.errors import FormatError
from bayesify.files import read_json, read_tensors

FORMAT = 1


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter that trains and every buffer, by name: what training can have changed."""
    parameters = dict(model.named_parameters())
    state = model.state_dict()
    return {n: t for n, t in state.items() if n not in parameters or parameters[n].requires_grad}


def load_trained_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Put a `trained_state` back, after checking every name and shape."""
    check_trained_state(model, state, source)
    own = model.state_dict()
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def check_trained_state(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Raise `FormatError` unless names and shapes are those of the model's `trained_state`."""
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
    if folder.exists():  # or the older one is the only one
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore model and optimizer; returns the progress and the best state.

    Raises:
        FormatError: the folder is missing, damaged, or of another run. All is checked before anything is changed.
    """
    folder = _found(folder)
    content = read_json(folder / "checkpoint.json", missing="there is no checkpoint to resume from")
    if content.get("format") != FORMAT:
        raise FormatError(f"{folder / 'checkpoint.json'}: format {content.get('format')!r}; expected {FORMAT}.")
    model_state = read_tensors(folder / "model.safetensors")
    best = _read(folder / "best.safetensors")
    try:
        _check_run(folder, dict(content["progress"]["run"]), run)
        state, groups, progress = _parse(folder, content, optimizer)
        states = len(progress["random"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{folder}: is damaged or no checkpoint of this program ({error!r}).") from error
    if states != run["processes"]:
        raise FormatError(f"{folder}: holds {states} random states; expected {run['processes']}.")
    if best:
        check_trained_state(model, best, str(folder / "best.safetensors"))
    load_trained_state(model, model_state, str(folder / "model.safetensors"))
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return progress, best


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint of that name, or the one before it."""
    return _found(folder).is_dir()


def _found(folder: Path) -> Path:
    old = folder.with_name(f".{folder.name}.old")
    return old if old.exists() and not folder.exists() else folder  # interrupted between the two moves of a save


def _check_run(folder: Path, before: dict[str, Any], run: dict[str, Any]) -> None:
    for name in run:
        if before.get(name) != run[name]:
            raise FormatError(
                f"{folder}: was written with {name}={before.get(name)!r}; found {run[name]!r}. "
                "Resume with the options of the interrupted run, or start a new one in another folder."
            )


def _parse(
    folder: Path, content: dict[str, Any], optimizer: torch.optim.Optimizer
) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """State and groups for the optimizer, and the progress."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in _read(folder / "optimizer.safetensors").items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    for index, entries in content["scalars"].items():
        state.setdefault(int(index), {}).update(entries)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameters[index].shape:
                raise FormatError(
                    f"{folder / 'optimizer.safetensors'}: {index}.{key} has shape {tuple(value.shape)}; "
                    f"expected {tuple(parameters[index].shape)}."
                )
    current = optimizer.state_dict()["param_groups"]
    if len(current) != len(content["groups"]):
        raise FormatError(f"{folder}: has {len(content['groups'])} parameter groups; expected {len(current)}.")
    groups = [{**saved, "params": group["params"]} for saved, group in zip(content["groups"], current, strict=True)]
    for saved in groups:
        if "betas" in saved:
            saved["betas"] = tuple(saved["betas"])
    progress = content["progress"]
    missing = {"step", "scheduler", "best_nll", "best_step", "random", "scaler", "run"} - set(progress)
    if missing:
        raise FormatError(f"{folder / 'checkpoint.json'}: the progress has no {sorted(missing)[0]!r}.")
    return state, groups, progress


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators as JSON."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],  # type: ignore[union-attr]
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else [],  # of this process's device
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def _read(path: Path) -> dict[str, Tensor]:
    """Tensors that outlive their file, which the next checkpoint replaces."""
    return {name: value.clone() for name, value in read_tensors(path).items()}


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # Tied parameters share memory, which safetensors refuses: each name gets its own copy.
    save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, path)
