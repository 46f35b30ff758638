"""Runs on shapes alone: a network without memory behind its tensors."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TypeVar

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bayesify.batch import map_tensors
from bayesify.distributions import Factor
from bayesify.layers import MemberVector

T = TypeVar("T")


@contextmanager
def quiet() -> Iterator[None]:
    """torch prints and logs what it was doing where it fails on a graph or on shapes, which is no error here."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def is_quantized(tensor: Tensor) -> bool:
    """Whether a tensor stores its values in a way of its own, as those of torchao do."""
    return is_traceable_wrapper_subclass(tensor)


@contextmanager
def on_shapes(model: nn.Module, inputs: T) -> Iterator[tuple[nn.Module, T]]:
    """A copy of a model, and of inputs in any structure, whose tensors have shapes but no memory; neither the model nor
    what listens to its outputs notices. It is without factors, which change no shape."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(map(is_quantized, tensors)):
        raise NotImplementedError("low-bit storage has no rule for shapes alone")
    added = [module for module in model.modules() if isinstance(module, (Factor, MemberVector))]
    theirs = {id(tensor) for module in added for tensor in module.parameters()}
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        memo: dict[int, Any] = {id(tensor): mode.from_tensor(tensor) for tensor in tensors if id(tensor) not in theirs}
        twin = copy.deepcopy(model, memo | dict.fromkeys(map(id, added)))
        for module in twin.modules():
            module._forward_hooks.clear()
        yield twin, map_tensors(inputs, mode.from_tensor)
