"""Which parameters enter linear maps of activations, seen while the network runs.

It knows nothing of the library's graphs, so that what these overlook shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_BIAS_AT = {"addmm": 0, "baddbmm": 0, "addmv": 0, "addbmm": 0, "convolution": 2, "linear": 2, "mkldnn_linear": 2}
_LINEAR = {
    *_BIAS_AT, "mm", "bmm", "mv", "dot", "mkldnn_rnn_layer", "lstm", "gru", "rnn_tanh", "rnn_relu", "einsum", "matmul",
    "grouped_mm", "native_multi_head_attention", "transformer_encoder_layer_fwd", "mkldnn_convolution",
}  # fmt: skip
"""Operations of aten, with the position of a bias where there is one."""


class LinearOperands(TorchDispatchMode):
    """Notes the parameters with two or more dimensions from which an operand of a linear map is computed.

    A tensor computed from parameters alone (a standardized weight, a learned query) stands for them; one in which
    an input of the network has a part does not, nor does anything multiplied with it element by element.

    Attributes:
        found: their names, each tied parameter under its first one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._names: Any = WeakIdKeyDictionary()  # {tensor: names of the parameters it is computed from}
        self._active: Any = WeakIdKeyDictionary()  # {tensor: True} where an input has a part in it
        self._written: dict[int, Any] = {}  # storages that activations were written into, kept so that ids stay theirs
        for name, parameter in model.named_parameters():
            self._names[parameter] = frozenset([name] if parameter.dim() > 1 else [])

    def inputs(self, value: Any) -> None:
        """These tensors are the network's inputs."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor):
                self._active[leaf] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        active = any(map(self._is_active, tensors))
        if active and func.overloadpacket.__name__.strip("_") in _LINEAR:
            self._note(func.overloadpacket.__name__.strip("_"), args, kwargs)
        if active:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._active[leaf] = True
            if func.overloadpacket.__name__.endswith("_") and args and isinstance(args[0], Tensor):
                storage = args[0].untyped_storage()
                self._written[storage._cdata] = storage
            return result
        names = frozenset().union(*(self._names.get(tensor, frozenset()) for tensor in tensors))
        if names:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._names[leaf] = names
        return result

    def _note(self, operation: str, args: Any, kwargs: Any) -> None:
        operands = [arg for place, arg in enumerate(args) if place != _BIAS_AT.get(operation)]
        for leaf in tree_leaves((operands, kwargs)):
            if isinstance(leaf, Tensor) and not self._is_active(leaf):
                self.found |= self._names.get(leaf, frozenset())

    def _is_active(self, tensor: Tensor) -> bool:
        return tensor in self._active or (bool(self._written) and tensor.untyped_storage()._cdata in self._written)


@torch.no_grad()
def linear_parameters(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, set[str]]:
    """The network's output, and the names of the parameters that enter linear maps of its activations."""
    with LinearOperands(model) as operands:
        operands.inputs((args, kwargs))
        output = model(*args, **kwargs)
    return output, operands.found
