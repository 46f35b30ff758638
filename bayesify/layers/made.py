"""What was made of a layer's parameters, such as packed weights, until they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")

_MADE: WeakKeyDictionary[nn.Module, tuple[Any, Any, Any]] = WeakKeyDictionary()
"""For each module the state of its weights, they, and what was made of them; neither copied nor saved with it."""


def made_of_parameters(module: nn.Module, make: Callable[[], T]) -> T:
    """What `make` makes of the parameters of a layer; made anew when they have changed.

    Whether inference tensors were changed, or others through `.data`, cannot be told.
    """
    weights = [weight for weight in module._parameters.values() if weight is not None]
    versions = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
    state = type(module), versions  # what is made differs between the classes that a layer takes
    known = _MADE.get(module)
    if known is None or known[0] != state:
        # They are kept, too, lest others get their place in memory.
        _MADE[module] = known = state, [weight.detach() for weight in weights], make()
    return known[2]
