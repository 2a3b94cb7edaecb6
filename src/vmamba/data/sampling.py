"""The order in which samples are taken: a function of (seed, epoch), with a state of two numbers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from vmamba.data.seeding import draw_seed


class SampleKey(NamedTuple):
    """What a data set is asked for: `index`, and the epoch, which decides how it is augmented."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which a key has no use for


class Groups(NamedTuple):
    """Samples that should be read together, such as those of a shard.

    Attributes:
        sizes: Of groups of consecutive samples.
        window: Groups whose samples an epoch mixes.
    """

    sizes: list[int]
    window: int


class EpochSampler(Sampler[SampleKey]):
    """Every sample once an epoch, dealt to the ranks in chunks, in turn.

    With a chunk as large as a rank's batch, the batches of all ranks together are what one process would read
    in a batch of their size: the number of processes changes nothing in what a step sees.

    Args:
        length: Samples in the data set.
        seed: Of the order.
        shuffle: Draw the order anew for each epoch; else it is that of the data set.
        rank: This process.
        world_size: Processes.
        chunk: Consecutive samples that go to the same rank.
        step: Samples of a step over all ranks, a multiple of `chunk * world_size`: those at the end that fill
            none are left out (training). Without it none is, and ranks may differ by a chunk (evaluation).
        groups: If any, the groups are shuffled, and the samples within each window of them.

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
        chunk: int = 1,
        step: int = 1,
        groups: Groups | None = None,
    ) -> None:
        if step > 1 and step % (chunk * world_size):
            share = chunk * world_size
            raise ValueError(f"step: expected a multiple of chunk * world_size, {share}, got {step}")
        if groups is not None and sum(groups.sizes) != length:
            raise ValueError(f"groups: expected sizes that add up to {length}, got {sum(groups.sizes)}")
        self.seed, self.shuffle = seed, shuffle
        self.groups = groups
        self.rank, self.world_size, self.chunk = rank, world_size, chunk
        self.length, self.total = length, length - length % step
        self.epoch = 0
        self.done = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; Lightning calls it, in a resumed run with other epochs first."""
        self.epoch = epoch

    def _mine(self) -> Iterator[int]:
        for start in range(self.rank * self.chunk, self.total, self.world_size * self.chunk):
            yield from range(start, min(start + self.chunk, self.total))

    def __len__(self) -> int:
        rounds, rest = divmod(self.total, self.world_size * self.chunk)
        return rounds * self.chunk + min(max(rest - self.rank * self.chunk, 0), self.chunk)

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(draw_seed("order", self.seed, self.epoch))
        if self.groups is None:
            return torch.randperm(self.length, generator=generator)
        sizes, window = self.groups
        groups = torch.arange(self.length).split(sizes)
        shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        windows = [torch.cat(shuffled[start : start + window]) for start in range(0, len(groups), window)]
        return torch.cat([own[torch.randperm(len(own), generator=generator)] for own in windows])

    def __iter__(self) -> Iterator[SampleKey]:
        order = self._order().tolist()
        epoch, consumed = self.done
        skipped = consumed if epoch == self.epoch else 0
        for position in self._mine():
            if position >= skipped:
                yield SampleKey(self.epoch, order[position])
