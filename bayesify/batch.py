"""Rows of a batch: expand B examples to K·B rows, and reduce K·B rows of output to the predictive.

Member-major everywhere: row k·B + i is member k, example i. Labels are expanded like any other input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bayesify.errors import DataError
from bayesify.tasks import IGNORED, TASKS, TaskName, resolve_task

_SHARED_INPUTS = {"cache_position"}
"""Inputs that never carry the batch, whatever their length."""
_PACKED_INPUTS = {
    "pixel_values", "pixel_values_images", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "image_sizes",
    "image_patches", "pixel_attention_mask", "pixel_position_ids", "image_position_ids", "video_position_ids",
    "second_per_grid_ts", "pixel_values_list", "spatial_shapes",
}  # fmt: skip
"""Images of vision–language models: those of all examples one after the other, however many each has."""
_LOGITS = {"logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits"}
"""Outputs that the task of a model is about, beside the one that predictions are made of; all others are averaged."""
_GRID = "grid_thw"
"""The input of a vision tower by itself that has a row for each image; of the images there are all patches."""
_OF_SEVERAL_ROWS = ("logits", "hidden_state", "hidden_states", "embeds", "pooler_output", "features")
"""Ends of the names of outputs that may have several rows of each example: its frames, patches or codebooks."""
_CACHES = {"mems"}
"""Outputs that are inputs of the next call, and keep the rows of all members for it."""
_PAIRWISE_OUTPUTS = "logits_"
"""Starts of the names of similarities [B, B] in contrastive models: of K·B by K·B, only those within a member have a
meaning."""


class Rows:
    """Where the batch is in a model's inputs and outputs: the first dimension, but for a bare recurrent layer."""

    def __init__(self, model: nn.Module) -> None:
        self.main = getattr(model, "main_input_name", None)
        self.recurrent = isinstance(model, nn.RNNBase)
        self.input_dim = 0 if not self.recurrent or model.batch_first else 1

    def batch_size(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """B, read from the main input or else the first tensor; images, where a tower gets the patches of all."""
        grid = _grid(kwargs)
        if grid is not None:
            return len(grid)
        main = kwargs.get(self.main) if isinstance(self.main, str) else None
        for value in (main, *args, *kwargs.values()):
            for leaf in _leaves(value):
                if isinstance(leaf, PackedSequence):
                    return int(leaf.batch_sizes[0])
                if leaf.dim() > self.input_dim:
                    return leaf.shape[self.input_dim]
        raise DataError("found no tensor with a batch dimension among the inputs; expected examples in the first one.")

    def values_per_example(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """How many target values that count an example has on average: the loss of a network is their mean.

        Targets that are no tensor, such as the objects of images, count as one.
        """
        found = [t for name, t in kwargs.items() if is_target(name) and isinstance(t, Tensor) and t.dim()]
        if not found:
            return 1.0
        return max(1, sum(int((t != IGNORED).sum()) for t in found)) / self.batch_size(args, kwargs)

    def expand(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], members: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Repeat every input that carries the batch `members` times."""
        if members == 1:
            return args, dict(kwargs)
        if _grid(kwargs) is not None:
            args, named = map_tensors((args, dict(kwargs)), lambda t: _repeat(t, t.shape[0], members, 0))
            return args, named
        return self.grow(args, kwargs, self.batch_size(args, kwargs), members)

    def grow(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: int, members: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Repeat everything of B rows, and leave what has another number of them."""
        expanded = tuple(
            _numbers_repeated(value, batch, members)
            if _are_numbers(value)
            else map_tensors(value, lambda t, d=self._dim(i): _repeat(t, batch, members, d))
            for i, value in enumerate(args)
        )
        return expanded, {name: self._expanded(name, value, batch, members) for name, value in kwargs.items()}

    def _expanded(self, name: str, value: Any, batch: int, members: int) -> Any:
        if name in _SHARED_INPUTS:
            return value
        if isinstance(value, list) and name.endswith("labels") and len(value) == batch:
            return value * members  # the objects or the masks of each image
        if _are_numbers(value):
            return _numbers_repeated(value, batch, members)
        packed = name in _PACKED_INPUTS and name != self.main
        dim = self._dim(name)
        return map_tensors(value, lambda t: _repeat(t, t.shape[0] if packed else batch, members, dim))

    def reduce(self, output: Any, members: int, batch: int, task: TaskName | None, temperature: float = 1.0) -> Any:
        """Average an output of K·B rows over members, in its own type: log of the mean probability as logits.

        Every member's logits are divided by the temperature first.
        """
        if task == "members":
            return output
        if self.recurrent:
            first = map_tensors(output[0], lambda t: _mean(t, members, self.input_dim))
            return first, map_tensors(output[1], lambda t: _mean(t, members, 1))
        try:
            main = self.outputs(output)
        except DataError:
            main = None
        return _reduce(output, members, batch, task, temperature, main)

    def joined(self, outputs: Sequence[Any], batch: int) -> Any:
        """Outputs of B rows, one of each member, as one of K·B rows, as if all had been computed side by side.

        What does not carry the batch is the first member's, and a loss the mean.
        """
        if self.recurrent:
            first = _side_by_side([output[0] for output in outputs], self.input_dim)
            states = [output[1] for output in outputs]
            if isinstance(states[0], tuple):
                return first, tuple(_side_by_side(parts, 1) for parts in zip(*states, strict=True))
            return first, _side_by_side(states, 1)
        return _joined(list(outputs), batch, None)

    def outputs(self, output: Any) -> Tensor:
        """The tensor that predictions are made of: `logits` where there are any, otherwise the first with rows.

        It carries the batch in `input_dim`; a packed sequence is padded. Question answering gives [B, 2, T]: where
        the answer starts and where it ends, each one of T tokens.
        """
        if self.recurrent:
            first = output[0]
            batch_first = self.input_dim == 0
            return pad_packed_sequence(first, batch_first)[0] if isinstance(first, PackedSequence) else first
        if _has_logits(output):
            return output["logits"] if isinstance(output, Mapping) else output.logits
        if isinstance(output, Mapping) and "start_logits" in output and "end_logits" in output:
            return torch.stack([output["start_logits"], output["end_logits"]], 1)
        for leaf in _leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim():
                return leaf
        raise DataError(f"found no tensor of real values in the model's output ({type(output).__name__}).")

    def _dim(self, name: int | str) -> int:
        return 1 if self.recurrent and name in (1, "hx") else self.input_dim


def is_target(name: str) -> bool:
    """Whether a network compares its outputs with the input of this name."""
    return name.endswith(("labels", "_positions"))


def add_to_loss(output: Any, value: Tensor) -> Any:
    """Add a scalar to the loss that a network computed itself from labels."""
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor) and output[0].dim() == 0:
        return (output[0] + value, *output[1:])
    if not isinstance(output, Mapping) or output.get("loss") is None:
        raise DataError(
            "the network was to add the KL to its own loss, but computed none. Give it the labels (label smoothing and "
            "loss functions of a trainer's own leave them out), or use bayesify's ELBO or FineTuner. After a training "
            "that was interrupted, set kl_weight of the model to 0."
        )
    output["loss"] = output["loss"] + value  # type: ignore[index]
    return output


def loss_of(output: Any) -> Tensor | None:
    """The loss that a network computed itself, if it did."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def map_tensors(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every tensor (or packed sequence) in nested tuples, lists, mappings and dataclasses."""
    if isinstance(value, (Tensor, PackedSequence)):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    if isinstance(value, Mapping):
        items = {name: map_tensors(item, function) for name, item in value.items()}
        return type(value)(**items) if dataclasses.is_dataclass(value) else type(value)(items)  # type: ignore[call-arg]
    return value


def are_plain(value: Any) -> bool:
    """Whether inputs or outputs are tensors, numbers and words in mappings, tuples and lists, and nothing with a state
    of its own, such as a cache."""
    if isinstance(value, Mapping):
        return all(map(are_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(are_plain, value))
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    map_tensors(value, lambda t: found.append(t) or t)
    return found


def _grid(kwargs: Mapping[str, Any]) -> Tensor | None:
    grid = kwargs.get(_GRID)
    return grid if isinstance(grid, Tensor) else None


def _has_logits(output: Any) -> bool:
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return isinstance(logits, Tensor)


def _repeat(value: Any, batch: int, members: int, dim: int) -> Any:
    if isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        repeated = padded.repeat(members, *[1] * (padded.dim() - 1))
        return pack_padded_sequence(repeated, lengths.repeat(members), batch_first=True, enforce_sorted=False)
    if value.dim() <= dim or value.shape[dim] != batch:
        return value
    return value.repeat(*[members if d == dim else 1 for d in range(value.dim())])


def _are_numbers(value: Any) -> bool:
    """Whether an input is an array, or a list of numbers, such as the lengths of sequences."""
    if isinstance(value, np.ndarray):
        return True
    return isinstance(value, list) and len(value) > 0 and all(isinstance(v, (bool, int, float)) for v in value)


def _numbers_repeated(value: Any, batch: int, members: int) -> Any:
    """The same of K·B rows if it is of B."""
    if isinstance(value, list):
        return value * members if len(value) == batch else value
    return np.concatenate([value] * members) if value.ndim and len(value) == batch else value


def _mean(value: Any, members: int, dim: int) -> Any:
    if isinstance(value, PackedSequence):
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        return pack_padded_sequence(
            _mean(padded, members, 0), lengths[: len(lengths) // members], batch_first=True, enforce_sorted=False
        )
    return value.unflatten(dim, (members, -1)).float().mean(dim).to(value.dtype)


def _side_by_side(values: Sequence[Any], dim: int) -> Any:
    if isinstance(values[0], PackedSequence):
        padded, lengths = zip(*(pad_packed_sequence(value, batch_first=True) for value in values), strict=True)
        return pack_padded_sequence(torch.cat(padded), torch.cat(lengths), batch_first=True, enforce_sorted=False)
    return torch.cat(list(values), dim)


def _joined(values: list[Any], batch: int, name: str | None) -> Any:
    first = values[0]
    if isinstance(first, PackedSequence):
        return _side_by_side(values, 0)
    if isinstance(first, Tensor):
        dim = _rows_dim(first.shape, batch, name)
        if dim is None:
            return torch.stack(values).mean(0) if first.dim() == 0 and first.is_floating_point() else first
        return torch.cat(values, dim)
    if isinstance(first, Mapping):
        items = {n: _joined([value[n] for value in values], batch, n) for n in first}
        return type(first)(**items) if dataclasses.is_dataclass(first) else type(first)(items)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        fields = {n: _joined([getattr(value, n) for value in values], batch, n) for n in names}
        return dataclasses.replace(first, **fields)
    if isinstance(first, (list, tuple)):
        if _is_of_each(first, batch, name):
            return type(first)(part for value in values for part in value)
        parts = [_joined(list(parts), batch, name) for parts in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def _reduce(
    output: Any, members: int, batch: int, task: TaskName | None, temperature: float, main: Tensor | None
) -> Any:
    def tensor(value: Any, name: str | None) -> Any:
        if isinstance(value, PackedSequence):
            return _mean(value, members, 0)
        if name is not None and name.startswith(_PAIRWISE_OUTPUTS) and value.shape == (members * batch,) * 2:
            value = torch.cat(diagonal_blocks(value, members))
        dim = _rows_dim(value.shape, members * batch, name)
        if dim is None:
            return value
        if not value.is_floating_point():
            return value.narrow(dim, 0, value.shape[dim] // members)
        if (name not in _LOGITS and value is not main) or dim:
            return _mean(value, members, dim)
        rows = value.unflatten(0, (members, -1))
        if temperature != 1.0:
            rows = rows / temperature
        return TASKS[resolve_task(value, task)].mixture(rows).to(value.dtype)

    def reduced(value: Any, name: str | None) -> Any:
        if isinstance(value, Mapping):
            items = {n: reduced(v, n) for n, v in value.items()}
            return type(value)(**items) if dataclasses.is_dataclass(value) else type(value)(items)  # type: ignore[call-arg]
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: reduced(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)
        if isinstance(value, (list, tuple)) and _is_of_each(value, members * batch, name):
            each = len(value) // members
            return type(value)(_mean(torch.cat(value[i::each]), members, 0) for i in range(each))
        return map_tensors(value, lambda t: tensor(t, name))

    return reduced(output, None)


def _has_several_rows(name: str | None) -> bool:
    return name is not None and name.endswith(_OF_SEVERAL_ROWS)


def _is_of_each(values: Any, rows: int, name: str | None) -> bool:
    """Whether an output is a list with a tensor, or several, of each row: an image has as many patches as it has."""
    tensors = all(isinstance(value, Tensor) and value.dim() for value in values)
    several = _has_several_rows(name) and len(values) > 0 and len(values) % rows == 0
    return tensors and several and all(_rows_dim(value.shape, rows, name) is None for value in values)


def _rows_dim(shape: torch.Size, rows: int, name: str | None) -> int | None:
    """Which dimension of an output holds the K·B rows, or several for each; `None` if there is none."""
    if not shape:
        return None
    if shape[0] == rows:
        return 0
    several = _has_several_rows(name)
    if several and shape[0] and shape[0] % rows == 0:
        return 0
    if name in _LOGITS or name in _CACHES or len(shape) < 3:
        return None
    second = shape[1] == rows or (several and shape[0] == 1 and shape[1] % rows == 0)
    return 1 if second else None  # [T, rows, d] or [layers, rows, ...]; or all tokens in one row


def diagonal_blocks(value: Tensor, members: int) -> list[Tensor]:
    """The [B, B] blocks of each member with itself in [K·B, K·B]."""
    return [block.chunk(members, 1)[k] for k, block in enumerate(value.chunk(members))]


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """A batch as (positional inputs, keyword inputs, labels).

    A mapping holds keyword inputs and "labels"; a tuple of two or more ends with the labels (or `None`); a tensor
    is one unlabeled input. Labels that are a list, such as the objects of each image, stay with the inputs: only the
    network itself knows what to do with them.
    """
    if isinstance(batch, Mapping):
        kwargs = {str(key): value for key, value in batch.items()}
        target = None if isinstance(kwargs.get("labels"), list) else kwargs.pop("labels", None)
        args: tuple[Any, ...] = ()
    elif isinstance(batch, (tuple, list)) and len(batch) > 0:
        args, target = (tuple(batch[:-1]), batch[-1]) if len(batch) > 1 else (tuple(batch), None)
        kwargs = {}
    elif isinstance(batch, Tensor):
        args, kwargs, target = (batch,), {}, None
    else:
        raise DataError(
            "a batch must be a mapping of inputs, a tuple (inputs ..., labels) or a tensor; "
            f"found {type(batch).__name__}."
        )
    if not args and not kwargs:
        raise DataError("a batch holds no inputs, only labels.")
    if target is not None and not isinstance(target, Tensor):
        raise DataError(
            f"labels must be a tensor; found {type(target).__name__}. "
            "The last entry of a tuple is read as the labels: end it with None if there are none."
        )
    return args, kwargs, target
