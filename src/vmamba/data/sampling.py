"""The order in which samples are read: a function of (seed, epoch), with a state of two numbers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from vmamba.data.seeding import draw_seed


class SampleKey(NamedTuple):
    """What a dataset is asked for.

    Attributes:
        epoch: Decides, with the rest, how the sample is augmented.
        index: Of the sample in the dataset.
        repetition: Tells apart the times that balanced sampling takes a sample in one epoch, so that each is
            augmented in its own way.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which a key has no use for
    repetition: int = 0


class SampleGroups(NamedTuple):
    """Samples that should be read together, such as those of a shard.

    Attributes:
        sizes: Of groups of consecutive samples.
        window: Groups whose samples an epoch mixes.
    """

    sizes: list[int]
    window: int


class EpochSampler(Sampler[SampleKey]):
    """Every sample once an epoch, or every class as often, dealt to the ranks in chunks, in turn.

    With a chunk as large as a rank's batch, the batches of all ranks together are what one process would read
    in a batch of their size: the number of processes changes nothing in what a step sees.

    Args:
        length: Samples in the dataset, and in an epoch.
        seed: Of the order.
        shuffle: Draw the order anew for each epoch; else it is that of the dataset.
        rank: This process.
        world_size: Processes.
        chunk: Consecutive samples that go to the same rank.
        step: Samples of a step over all ranks, a multiple of `chunk * world_size`: those at the end that fill
            none are left out (training). Without it none is, and ranks may differ by a chunk (evaluation).
        groups: If any, the groups are shuffled, and the samples within each window of them.
        balance: Of each sample its class, if every class should be taken equally often: samples of small
            classes several times an epoch, those of large ones in turn over the epochs.

    Attributes:
        epoch: The epoch that an iteration reads.
        done: An epoch, and the samples of it, over all ranks, that were read before and are left out.

    Raises:
        ValueError: The arguments do not fit each other.
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
        groups: SampleGroups | None = None,
        balance: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> None:
        if step > 1 and step % (chunk * world_size):
            share = chunk * world_size
            raise ValueError(f"step: expected a multiple of chunk * world_size, {share}, got {step}")
        if groups is not None and sum(groups.sizes) != length:
            raise ValueError(f"groups: expected sizes that add up to {length}, got {sum(groups.sizes)}")
        if balance is not None and (groups is not None or not shuffle):
            raise ValueError("balance: needs shuffle, and no groups")
        if balance is not None and len(balance) != length:
            raise ValueError(f"balance: expected the classes of {length} samples, got {len(balance)}")
        self.seed, self.shuffle = seed, shuffle
        self.groups = groups
        self._members = None if balance is None else _members(balance)
        self.rank, self.world_size, self.chunk = rank, world_size, chunk
        self.length, self.total = length, length - length % step
        self.epoch = 0
        self.done = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch; Lightning calls it, in a resumed run with other epochs first."""
        self.epoch = epoch

    def _positions(self) -> Iterator[int]:
        """Of this rank, in the epoch's order."""
        for start in range(self.rank * self.chunk, self.total, self.world_size * self.chunk):
            yield from range(start, min(start + self.chunk, self.total))

    def __len__(self) -> int:
        rounds, rest = divmod(self.total, self.world_size * self.chunk)
        return rounds * self.chunk + min(max(rest - self.rank * self.chunk, 0), self.chunk)

    def _order(self) -> Tensor:
        """Indices, or with balanced classes pairs of index and repetition, (length,) or (length, 2)."""
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(draw_seed("order", self.seed, self.epoch))
        if self._members is not None:
            return self._balanced_order(self._members, generator)
        if self.groups is None:
            return torch.randperm(self.length, generator=generator)
        sizes, window = self.groups
        groups = torch.arange(self.length).split(sizes)
        shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        windows = [torch.cat(shuffled[start : start + window]) for start in range(0, len(groups), window)]
        return torch.cat([mixed[torch.randperm(len(mixed), generator=generator)] for mixed in windows])

    def _balanced_order(self, members: list[Tensor], generator: torch.Generator) -> Tensor:
        """Each class walks through endless permutations of its samples, epoch after epoch."""
        share, rest = divmod(self.length, len(members))
        one_more = set(torch.randperm(len(members), generator=generator)[:rest].tolist())
        stride = share + bool(rest)
        pairs = []
        for number, indices in enumerate(members):
            start = self.epoch * stride
            stop = start + share + (number in one_more)
            first, last = start // len(indices), (stop - 1) // len(indices)
            for turn in range(first, last + 1):
                order = torch.Generator().manual_seed(draw_seed("class order", self.seed, number, turn))
                permuted = indices[torch.randperm(len(indices), generator=order)]
                begin = turn * len(indices)
                drawn = permuted[max(start - begin, 0) : stop - begin]
                pairs.append(torch.stack([drawn, torch.full_like(drawn, turn - first)], 1))
        drawn = torch.cat(pairs)
        return drawn[torch.randperm(len(drawn), generator=generator)]

    def __iter__(self) -> Iterator[SampleKey]:
        order = self._order().tolist()
        epoch, consumed = self.done
        skipped = consumed if epoch == self.epoch else 0
        for position in self._positions():
            if position >= skipped:
                drawn = order[position]
                yield SampleKey(self.epoch, *drawn) if self._members else SampleKey(self.epoch, drawn)


def _members(classes: Sequence[int] | NDArray[np.int64]) -> list[Tensor]:
    """The indices of each class that has samples."""
    of_class = torch.as_tensor(np.asarray(classes, dtype=np.int64))
    return [torch.nonzero(of_class == label).flatten() for label in of_class.unique().tolist()]
