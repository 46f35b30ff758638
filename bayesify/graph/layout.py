"""Where the batch is in the inputs of each layer: watched in a run that computes shapes only."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bayesify.batch import Rows, map_tensors
from bayesify.graph.inputs import Inputs
from bayesify.layers import OUT_BATCH_DIM, Rank1Layer, rank1_class
from bayesify.modes import evaluating

_TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_MOVES = {"transpose", "swapaxes", "swapdims", "permute", "movedim"}


def may_move_batch(model: nn.Module) -> bool:
    """Whether a part of the model works on [time, batch, ...], as far as its attributes and its source say."""
    return any(
        getattr(module, "batch_first", None) is False or _swaps_first_dimensions(type(module))
        for module in model.modules()
    )


@cache
def _swaps_first_dimensions(cls: type[nn.Module]) -> bool:
    """Whether the source of a class holds x.transpose(0, 1), x.permute(1, 0, ...) or the like."""
    if cls.__module__.startswith("torch."):
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MOVES:
            dims = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and type(n.value) is int]
            if set(dims[:2]) == {0, 1}:
                return True
    return False


def known_dims(model: nn.Module) -> dict[str, int]:
    """{layer: dimension of its input that carries the batch} inside torch.nn's own attention, where it is not 0."""
    dims: dict[str, int] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            dims[f"{prefix}out_proj"] = OUT_BATCH_DIM
        elif isinstance(module, _TRANSFORMER_LAYERS) and not module.self_attn.batch_first:
            dims |= {f"{prefix}linear1": 1, f"{prefix}linear2": 1}
    return dims


def observed_dims(model: nn.Module, inputs: Inputs, layers: Iterable[str]) -> dict[str, int] | None:
    """{layer: dimension of its input that carries the batch}, for dense layers whose answer is unambiguous.

    The model runs twice on shapes alone, with two and with three times the batch: the dimension that grows is the
    batch, or whole rows of it such as windows. `None` if it cannot be run like this.
    """
    names = [name for name in layers if _takes_any_shape(model.get_submodule(name))]
    if not names or any(is_quantized(tensor) for tensor in (*model.parameters(), *model.buffers())):
        return None  # low-bit storage has no rule for shapes alone
    try:
        small, large = (_shapes(model, inputs, names, times) for times in (2, 3))
    except Exception:
        return None  # control flow on values, or an operation without a rule for shapes
    found: dict[str, int] = {}
    for name in names:
        pairs = list(zip(small[name], large[name], strict=False))
        dims = {tuple(d for d in range(len(a)) if 3 * a[d] == 2 * b[d]) for a, b in pairs if len(a) == len(b)}
        if len(dims) == 1 and len(only := dims.pop()) == 1:
            found[name] = only[0]
    return found


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor stores its values in a way of its own, as those of torchao do."""
    return is_traceable_wrapper_subclass(tensor)


def _takes_any_shape(layer: nn.Module) -> bool:
    """Dense layers take [..., channels]; the others say themselves where the batch is."""
    if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)):
        return False
    equivalent = type(layer) if isinstance(layer, Rank1Layer) else rank1_class(type(layer))
    return equivalent is not None and equivalent.channel_dim == -1


def _shapes(model: nn.Module, inputs: Inputs, names: list[str], times: int) -> dict[str, list[torch.Size]]:
    """Shapes of what each layer gives, call by call; a dense layer's inputs have the batch where its outputs do."""
    args, kwargs = Rows(model).expand(*inputs, times)
    shapes: dict[str, list[torch.Size]] = {name: [] for name in names}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin = _shape_twin(model, mode)

        def watch(name: str) -> Any:
            def hook(_: nn.Module, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if isinstance(first, Tensor):
                    shapes[name].append(first.shape)

            return hook

        for name in names:
            twin.get_submodule(name).register_forward_hook(watch(name))
        args, kwargs = (map_tensors(part, mode.from_tensor) for part in (args, kwargs))
        with evaluating(twin):
            twin(*args, **kwargs)
    return shapes


def _shape_twin(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model's structure whose tensors have shapes but no memory; the model itself is not touched."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): mode.from_tensor(tensor) for tensor in tensors})
