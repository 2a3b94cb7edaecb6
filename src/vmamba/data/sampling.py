"""The order in which samples are read: a function of (seed, epoch), with a state of two numbers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from vmamba.data.seeding import draw_seed


class SampleKey(NamedTuple):
    """The key of a sample, which also determines its augmentation.

    Attributes:
        epoch: The epoch.
        index: Index of the sample in the dataset.
        repetition: Counts how often balanced sampling has drawn the sample in this epoch, so that each draw
            is augmented differently.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not needed here
    repetition: int = 0


class SampleGroups(NamedTuple):
    """Samples that should be read together, such as those of a shard.

    Attributes:
        sizes: The number of samples in each group; the samples of a group are consecutive.
        window: How many groups are shuffled together.
    """

    sizes: list[int]
    window: int


class EpochSampler(Sampler[SampleKey]):
    """Every sample once an epoch, dealt to the ranks in chunks, in turn.

    With a chunk as large as a rank's batch, the batches of all ranks together are what one process would read
    in a batch of their size: the number of processes changes nothing in what a step sees.

    Args:
        length: Samples in the dataset.
        seed: Of the order.
        shuffle: Draw the order anew for each epoch; else it is that of the dataset.
        rank: This process.
        world_size: Processes.
        chunk: Consecutive samples that go to the same rank.
        step: Samples of a step over all ranks, a multiple of `chunk * world_size`; an incomplete step at the
            end is dropped (training). With 1 none is, and ranks may differ by a chunk (evaluation).
        groups: If given, the groups are shuffled, and then the samples within each window of groups.
        alike: If given, a number for each sample: when shuffled, samples 2i and 2i + 1 of the order have the
            same, but for the last two where two numbers have a sample left over.

    Attributes:
        epoch: The epoch that an iteration reads.
        done: An epoch, and how many of its samples, over all ranks, to skip because they were read before.

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
        alike: Sequence[int] | NDArray[Any] | None = None,
    ) -> None:
        if step > 1 and step % (chunk * world_size):
            share = chunk * world_size
            raise ValueError(f"step: expected a multiple of chunk * world_size, {share}, got {step}")
        if groups is not None and sum(groups.sizes) != length:
            raise ValueError(f"groups: expected sizes that add up to {length}, got {sum(groups.sizes)}")
        self.seed, self.shuffle = seed, shuffle
        self.groups, self.alike = groups, alike
        self.rank, self.world_size, self.chunk = rank, world_size, chunk
        self.length, self.total = length, length - length % step
        self.epoch = 0
        self.done = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch. In a resumed run Lightning calls it with other epochs first."""
        self.epoch = epoch

    def _positions(self) -> Iterator[int]:
        """This rank's positions in the epoch's order."""
        for start in range(self.rank * self.chunk, self.total, self.world_size * self.chunk):
            yield from range(start, min(start + self.chunk, self.total))

    def __len__(self) -> int:
        rounds, rest = divmod(self.total, self.world_size * self.chunk)
        return rounds * self.chunk + min(max(rest - self.rank * self.chunk, 0), self.chunk)

    def _order(self) -> list[tuple[int, ...]]:
        """(index,) or (index, repetition) of each sample, in the epoch's order."""
        return [(index,) for index in self._indices().tolist()]

    def _indices(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(draw_seed("order", self.seed, self.epoch))
        if self.groups is None:
            order = torch.randperm(self.length, generator=generator)
            return order if self.alike is None else _in_pairs(order, self.alike)
        sizes, window = self.groups
        groups = torch.arange(self.length).split(sizes)
        shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
        windows = [torch.cat(shuffled[start : start + window]) for start in range(0, len(groups), window)]
        return torch.cat([mixed[torch.randperm(len(mixed), generator=generator)] for mixed in windows])

    def __iter__(self) -> Iterator[SampleKey]:
        order = self._order()
        epoch, consumed = self.done
        skipped = consumed if epoch == self.epoch else 0
        for position in self._positions():
            if position >= skipped:
                yield SampleKey(self.epoch, *order[position])


def _in_pairs(order: Tensor, kinds: Sequence[int] | NDArray[Any]) -> Tensor:
    """The order in which samples find another of their kind; those left over come last."""
    waiting: dict[int, int] = {}
    ordered: list[int] = []
    for index in order.tolist():
        kind = int(kinds[index])
        if kind in waiting:
            ordered += [waiting.pop(kind), index]
        else:
            waiting[kind] = index
    return torch.tensor([*ordered, *waiting.values()], dtype=torch.int64)


class BalancedSampler(EpochSampler):
    """Every class equally often, in an epoch as long as that of `EpochSampler`.

    Samples of small classes are drawn several times an epoch, those of large ones in some epochs only: each
    class runs through its samples in one random permutation after another, without end.

    Args:
        classes: The class of each sample.
        options: As `EpochSampler`, but for `shuffle`, `groups` and `alike`.
    """

    def __init__(self, classes: Sequence[int] | NDArray[np.int64], **options: Any) -> None:
        super().__init__(len(classes), **options)
        of_class = torch.as_tensor(np.asarray(classes, dtype=np.int64))
        self._members = [torch.nonzero(of_class == label).flatten() for label in of_class.unique().tolist()]

    def _order(self) -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(draw_seed("order", self.seed, self.epoch))
        share, rest = divmod(self.length, len(self._members))
        one_more = set(torch.randperm(len(self._members), generator=generator)[:rest].tolist())
        stride = share + bool(rest)
        pairs = []
        for number in range(len(self._members)):
            start = self.epoch * stride
            pairs.append(self._walk(number, start, start + share + (number in one_more)))
        drawn = torch.cat(pairs)
        return [(i, n) for i, n in drawn[torch.randperm(len(drawn), generator=generator)].tolist()]

    def _walk(self, number: int, start: int, stop: int) -> Tensor:
        """Draws `start` to `stop` of a class, (draws, 2): index, and the number of the permutation."""
        members = self._members[number]
        first, last = start // len(members), (stop - 1) // len(members)
        pairs = [torch.empty(0, 2, dtype=torch.int64)]
        for turn in range(first, last + 1):
            generator = torch.Generator().manual_seed(draw_seed("class order", self.seed, number, turn))
            permuted = members[torch.randperm(len(members), generator=generator)]
            begin = turn * len(members)
            drawn = permuted[max(start - begin, 0) : stop - begin]
            pairs.append(torch.stack([drawn, torch.full_like(drawn, turn - first)], 1))
        return torch.cat(pairs)


def sampler_for(dataset: Any, training: bool, **options: Any) -> EpochSampler:
    """The order of a dataset's samples: shuffled for training, balanced, in groups or in pairs as it says.

    Args:
        dataset: May have the attributes `balance` and `groups` of `ImageDataset`, and `shapes_alike`: whether
            each sample is landscape. Samples 2i and 2i + 1 of training are alike then, and padded little.
        training: Whether to shuffle.
        options: `seed`, `rank`, `world_size`, `chunk` and `step` of `EpochSampler`.
    """
    balance = getattr(dataset, "balance", None)
    if training and balance is not None:
        return BalancedSampler(balance, **options)
    groups, alike = getattr(dataset, "groups", None), getattr(dataset, "shapes_alike", None)
    return EpochSampler(len(dataset), shuffle=training, groups=groups, alike=alike, **options)
