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
        self._held: dict[str, Held] | None = None
        self._links: list[tuple[nn.Module, str, nn.Module]] = []
        self._alike: list[list[Factor]] = []
        self._places: list[Any] = []

    def forget(self) -> None:
        """Look anew at the next call."""
        self._held, self._places = None, []

    def check(self) -> None:
        """See that what was found is in the network still.

        Raises:
            BayesifyError: somebody has taken layers out, and their factors with them.
        """
        if self._held is not None and all(above._modules.get(name) is below for above, name, below in self._links):
            return
        found, links = _look(self._model)
        before, here = self._held or {}, {id(module) for module in found.values()}
        gone = [name for name, module in before.items() if id(module) not in here]
        if gone:
            layers = list(dict.fromkeys(name.partition(".rank1.")[0] for name in gone))
            raise BayesifyError(
                f"layers with factors were taken out of the network after the conversion: {', '.join(layers[:3])}"
                f"{f' and {len(layers) - 3} more' if len(layers) > 3 else ''}. Change a network before bayesify(), or "
                "what merge() or unload() gives; timm's reparameterize_model, too."
            )
        self._held, self._links, self._places = found, links, []

    def joined(self) -> list[tuple[Factor, list[Factor]]]:
        """All factors, side by side.

        Raises:
            BayesifyError: there are none.
        """
        factors = self._factors()
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
        factors = self._factors()
        for module in self._all():
            if isinstance(module, (MemberVector, MemberNorm)):
                module.hold(members)
        if seed is None or not any(factor.random for factor in factors):
            # Not side by side: the copies would take longer than the rest, in each step of a decoder.
            means = torch._foreach_clamp_min([factor.mean[members] for factor in factors], -CLIP)  # type: ignore[attr-defined]
            torch._foreach_clamp_max_(means, CLIP)  # type: ignore[attr-defined]
            for factor, mean in zip(factors, means, strict=True):
                factor.hold(mean)
            return False
        groups = self.joined()
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

    def _factors(self) -> list[Factor]:
        factors = [module for module in self._all() if isinstance(module, Factor)]
        if not factors:
            raise BayesifyError("this model has been unloaded: nothing in it is Bayesian any more.")
        return factors

    def _all(self) -> list[Held]:
        if self._held is None:
            self.check()
        return list((self._held or {}).values())


def _look(model: nn.Module) -> tuple[dict[str, Held], list[tuple[nn.Module, str, nn.Module]]]:
    """What can hold something, by name; and each (module, name of a part, part) on the way there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    held = {name: module for name, module in model.named_modules() if isinstance(module, Held)}
    paths: dict[str, None] = {}
    for name in held:
        while name:
            paths[name] = None
            name = name.rpartition(".")[0]
    return held, [(modules[p.rpartition(".")[0]], p.rpartition(".")[2], modules[p]) for p in paths]
