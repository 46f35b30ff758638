"""Batch norm with scale, shift and running statistics of each member's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bayesify.added import Held
from bayesify.errors import BayesifyError
from bayesify.layers.members import MemberVector
from bayesify.layers.registry import Derived, derived_class, replace_class

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class MemberNorm(Held):
    """What K members have of their own in one batch norm over C channels.

    `weight` and `bias` are offsets [K, C] from the shared ones; running statistics are [K, C], counts [K].
    """

    held: slice | None

    def __init__(self, layer: _BatchNorm, members: int) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            shared = getattr(layer, name, None)
            own = None if shared is None else MemberVector(members, layer.num_features, shared.device)
            self.add_module(name, own)
        for name in _STATISTICS:
            shared = getattr(layer, name, None)
            self.register_buffer(name, None if shared is None else torch.stack([shared] * members))
        self.members = members

    @property
    def computed(self) -> list[int] | None:
        """The members whose rows the next forward has; None outside of a `BayesianModel`'s pass."""
        return None if self.held is None else list(range(*self.held.indices(self.members)))

    @torch.no_grad()
    def reset(self, layer: nn.Module) -> None:
        """Take the shared statistics for every member."""
        for name in _STATISTICS:
            own = getattr(self, name)
            if own is not None:
                own.copy_(getattr(layer, name).expand_as(own))


class MemberBatchNorm(Derived):
    """A batch norm whose rows, member-major, are normalized member by member by the layer's own forward."""

    rank1: MemberNorm  # type: ignore[assignment]
    prefix = "Member"

    def forward(self, input: Tensor) -> Tensor:
        members = self.rank1.computed
        if members is None:
            with self._state_of(None):
                return super().forward(input)  # type: ignore[misc]
        if input.shape[0] % len(members):
            raise BayesifyError(
                f"a batch norm of {len(members)} members got {input.shape[0]} rows, which is no multiple. Call the "
                "BayesianModel, not the network inside it."
            )
        outputs = []
        for member, part in zip(members, input.chunk(len(members)), strict=True):
            with self._state_of(member):
                outputs.append(super().forward(part))  # type: ignore[misc]
        return torch.cat(outputs)

    def state_of(self, member: int | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scale and shift, and the statistics, of one member, or their averages over members."""
        own = self.rank1
        affine: dict[str, Tensor] = {}
        for name in ("weight", "bias"):
            vector: MemberVector | None = getattr(own, name)
            if vector is not None:
                offset = vector.offset.mean(0) if member is None else vector.offset[member]
                shared = getattr(self, name)
                affine[name] = (shared + offset).to(shared.dtype)
        statistics = {name: getattr(own, name) for name in _STATISTICS if getattr(own, name) is not None}
        if member is not None:
            return affine, {name: value[member] for name, value in statistics.items()}
        return affine, {n: v[0].clone() if n == "num_batches_tracked" else v.mean(0) for n, v in statistics.items()}

    @torch.no_grad()
    def share_statistics(self) -> None:
        """Give the layer itself the members' average statistics, if training has moved them."""
        statistics = self.state_of(None)[1]
        if any(not torch.equal(self.rank1.get_buffer(name)[0], self.get_buffer(name)) for name in statistics):
            for name, value in statistics.items():
                self.get_buffer(name).copy_(value)

    @contextmanager
    def _state_of(self, member: int | None) -> Iterator[None]:
        """Put one member's state in place, so that the layer's own forward uses (and updates) it."""
        affine, statistics = self.state_of(member)
        parameters = {name: self._parameters[name] for name in affine}
        buffers = {name: self._buffers[name] for name in statistics}
        try:
            self._parameters.update(affine)  # type: ignore[arg-type]
            self._buffers.update(statistics)
            yield
        finally:
            self._parameters.update(parameters)
            self._buffers.update(buffers)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        shared = any(f"{prefix}{name}" in state_dict for name in _STATISTICS)  # asked first: torch may add a count
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[arg-type]
        if shared and not any(key.startswith(f"{prefix}rank1.") for key in state_dict):
            self.rank1.reset(self)


def attach_norm(layer: _BatchNorm, members: int) -> None:
    """Give each member its own state of a batch norm, in place."""
    replace_class(layer, derived_class(MemberBatchNorm, type(layer)), MemberNorm(layer, members))
