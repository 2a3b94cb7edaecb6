"""Split off validation samples from training data that have no validation split."""

from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from vmamba.data.decoding import DecodedImage
from vmamba.data.sampling import SampleGroups
from vmamba.data.source import ClassifiedImages
from vmamba.errors import DataError


def choose_held_back(
    keys: Sequence[str], labels: NDArray[np.int64], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Choose the validation samples: in each class those with the smallest hashes of seed and key.

    The choice depends neither on the order of the samples nor on where the dataset is stored. Adding a sample
    to a class moves at most one other sample from one side to the other.

    Args:
        keys: The samples' keys; see `ImageSource.key`.
        labels: The samples' labels.
        fraction: Fraction of each class, rounded; if the class has two samples, each side gets at least one.
        seed: Seed of the hashes; another seed chooses other samples.

    Returns:
        A mask, true for the validation samples.
    """
    members: dict[int, list[tuple[bytes, int]]] = defaultdict(list)
    for index, (key, label) in enumerate(zip(keys, labels.tolist(), strict=True)):
        text = f"{seed}\0{key}".encode(errors="surrogateescape")
        members[label].append((blake2b(text, digest_size=16).digest(), index))
    held_back = np.zeros(len(keys), dtype=bool)
    for hashes in members.values():
        number = min(max(round(fraction * len(hashes)), 1), len(hashes) - 1)
        for _, index in sorted(hashes)[:number]:
            held_back[index] = True
    return held_back


class SplitImages(ClassifiedImages):
    """One side of an automatic split of a source.

    Args:
        source: All samples.
        split: "train", or "val" for the samples that are held back.
        fraction: Fraction of each class to hold back.
        seed: See `choose_held_back`.

    Raises:
        DataError: The labels cannot be read without fetching the images, or the side is empty.
    """

    def __init__(
        self, source: ClassifiedImages, split: Literal["train", "val"], fraction: float, seed: int = 0
    ) -> None:
        labels = source.read_labels()
        held_back = choose_held_back([source.key(i) for i in range(len(source))], labels, fraction, seed)
        self.source, self.split, self.classes = source, split, source.classes
        self.indices = np.flatnonzero(held_back if split == "val" else ~held_back)
        self._labels, self.decoding = labels[self.indices], source.decoding
        if not len(self.indices):
            raise DataError(f"{source}: no class has two samples, of which one could be held back")
        if source.groups is not None:
            ends = np.cumsum(source.groups.sizes)
            counts = np.bincount(np.searchsorted(ends, self.indices, "right"), minlength=len(ends))
            self.groups = SampleGroups(counts.tolist(), source.groups.window)

    def __str__(self) -> str:
        return f"{self.source} ({self.split} side of an automatic split)"

    def __len__(self) -> int:
        return len(self.indices)

    def open(self, index: int) -> str | Path | BinaryIO:
        return self.source.open(int(self.indices[index]))

    def image(self, index: int) -> DecodedImage:
        return self.source.image(int(self.indices[index]))

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read_labels(self) -> NDArray[np.int64]:
        return self._labels

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def key(self, index: int) -> str:
        return self.source.key(int(self.indices[index]))
