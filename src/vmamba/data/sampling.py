"""The order in which samples are taken: a function of (seed, epoch), with a state of two numbers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from vmamba.data.seeding import draw_seed


class SampleKey(NamedTuple):
    """What a data set is asked for: `index`, and the epoch, which decides how it is augmented."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which a key has no use for


class EpochSampler(Sampler[SampleKey]):
    """Every sample once an epoch, dealt to the ranks in turn.

    Args:
        length: Samples in the data set.
        seed: Of the order.
        shuffle: Draw the order anew for each epoch; else it is that of the data set.
        rank: This process.
        world_size: Processes.
        even: Give every rank as many samples, by leaving out up to `world_size - 1` of them (training);
            without it the last may have one less (evaluation).

    Attributes:
        epoch: The epoch that an iteration reads.
        done: An epoch, and the samples of it, over all ranks, that were taken before and are left out.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        even: bool = True,
    ) -> None:
        self.length, self.seed, self.shuffle = length, seed, shuffle
        self.rank, self.world_size, self.even = rank, world_size, even
        self.epoch = 0
        self.done = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; Lightning calls it, in a resumed run with other epochs first."""
        self.epoch = epoch

    def __len__(self) -> int:
        total = self.length - self.length % self.world_size if self.even else self.length
        return len(range(self.rank, total, self.world_size))

    def __iter__(self) -> Iterator[SampleKey]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(draw_seed("order", self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        if self.even:
            order = order[: self.length - self.length % self.world_size]
        epoch, consumed = self.done
        skipped = consumed if epoch == self.epoch else 0
        for index in order[skipped + self.rank :: self.world_size]:
            yield SampleKey(self.epoch, index)
