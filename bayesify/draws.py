"""The draws of all factors of a network, held for the length of a pass."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayesify.added import Held
from bayesify.config import Rank1Config
from bayesify.distributions import CLIP, Factor, alike, hold_parts, side_by_side
from bayesify.errors import BayesifyError
from bayesify.layers import MemberNorm, MemberVector


class Draws:
    """Gives every factor of a network its draw, and what members have of their own the members that are computed.

    What is in the network is looked up once; `forget` when sites come or go.
    """

    def __init__(self, model: nn.Module, config: Rank1Config) -> None:
        self._model = model
        self._config = config
        self._held: list[Held] | None = None
        self._alike: list[list[Factor]] = []
        self._places: list[Any] = []

    def forget(self) -> None:
        """Look anew at the next call."""
        self._held, self._places = None, []

    def joined(self) -> list[tuple[Factor, list[Factor]]]:
        """All factors, side by side.

        Raises:
            BayesifyError: there are none.
        """
        factors = [module for module in self._all() if isinstance(module, Factor)]
        if not factors:
            raise BayesifyError("this model has been unloaded: nothing in it is Bayesian any more.")
        places = [
            (value.device, value.dtype)
            for factor in factors
            for value in factor._parameters.values()
            if value is not None
        ]
        if places != self._places:
            self._alike, self._places = alike(factors), places
        return side_by_side(self._alike)

    @contextmanager
    def drawn(self, members: slice, examples: int, seed: Any) -> Iterator[None]:
        """Hold draws inside, and none afterwards."""
        self.hold(members, examples, seed)
        try:
            yield
        finally:
            self.release()

    def hold(self, members: slice, examples: int, seed: Any) -> bool:
        """Give every factor its draw: [k·B, d] rows for noise per example, [k, d] per member or at the mean.

        Returns whether the draws are random.

        `seed` is anything with a repr; `None` means posterior means. Each member has a generator of its own, so
        its draws do not depend on which other members are computed beside it.
        """
        groups = self.joined()
        for module in self._all():
            if isinstance(module, (MemberVector, MemberNorm)):
                module.hold(members)
        if seed is None or not any(factor.random for factor, _ in groups):
            for factor, parts in groups:
                hold_parts(parts, factor.mean[members].clamp(-CLIP, CLIP))
            return False
        each = examples if self._config.noise == "example" else 1
        device = groups[0][1][0].loc.device
        noise: list[list[Tensor]] = [[] for _ in groups]
        for member in range(*members.indices(self._config.members)):
            generator = torch.Generator(device).manual_seed(random.Random(repr((seed, member))).getrandbits(63))
            for drawn, (factor, _) in zip(noise, groups, strict=True):
                drawn.append(factor.noise(each, generator))
        for drawn, (factor, parts) in zip(noise, groups, strict=True):
            hold_parts(parts, factor.transform(torch.stack(drawn), members).flatten(0, 1))
        return True

    def release(self) -> None:
        """Hold nothing."""
        for module in self._all():
            module.hold(None)

    def _all(self) -> list[Held]:
        if self._held is None:
            self._held = [module for module in self._model.modules() if isinstance(module, Held)]
        return self._held
