"""Randomness that is a function of what it is for, and leaves the global random states as they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*parts: object) -> int:
    """A seed in 0 … 2⁶³ − 1 that depends on the `repr` of `parts` alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Seed python, numpy and torch (CPU) from `parts`, and give them their states back afterwards."""
    import numpy as np

    seed = seed_of(*parts)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
