"""Batches of one process: its rows of every global batch, in an order that depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from bayesify.errors import DataError


class RankBatches(Sampler[list[int]]):
    """Index lists of one process. All processes together see each global batch exactly once.

    Args:
        length: number of examples.
        batch_size: of the global batch; the last, incomplete one is dropped unless it is the only one.
        rank, world: this process and the number of processes.
        seed: of the shuffling.
    """

    def __init__(self, length: int, batch_size: int, *, rank: int, world: int, seed: int) -> None:
        if length == 0:
            raise DataError("the training data set is empty.")
        self.length = length
        self.batch_size = min(batch_size, length)
        if self.batch_size % world:
            raise DataError(
                f"a batch of {self.batch_size} examples cannot be shared by {world} processes; "
                f"give a batch_size that is a multiple of {world}."
            )
        self.rank, self.world, self.seed = rank, world, seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        share = self.batch_size // self.world
        for number in range(self.start, len(self)):
            first = number * self.batch_size + self.rank * share
            yield order[first : first + share]


def endless(loader: DataLoader[Any], sampler: RankBatches, dataset: Dataset[Any], first: int) -> Iterator[Any]:
    """Batches for ever, from global batch number `first` on; the data set's epoch follows.

    Workers of every process and epoch have random numbers of their own, which do not depend on where a run began.
    """
    sampler.epoch, sampler.start = divmod(first, len(sampler))
    while True:
        if loader.generator is not None:
            loader.generator.manual_seed((sampler.seed * 1_000_003 + sampler.epoch) * sampler.world + sampler.rank)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(sampler.epoch)  # type: ignore[attr-defined]
        yield from loader
        sampler.epoch += 1
        sampler.start = 0
