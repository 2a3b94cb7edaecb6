"""What every source of images has in common, whatever its targets are.

A source of images with other targets than classes (boxes, masks) subclasses `ImageSource`: it says where an
encoded image lies (`open`) and what its target is. Decoding, order, and errors are shared.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmamba.data.decoding import RGB, DecodedImage, Decoding, read_image
from vmamba.data.sampling import SampleGroups
from vmamba.errors import DataError

log = logging.getLogger(__name__)

Target = TypeVar("Target")


class ImageSource(ABC, Generic[Target]):
    """Images and their targets, by number; `str` of one says where it is, for messages."""

    decoding: Decoding = RGB
    groups: SampleGroups | None = None
    """Where samples should be read together."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> str | Path | BinaryIO:
        """Where the encoded image lies: a path, or a file that is open."""

    @abstractmethod
    def target(self, index: int) -> Target:
        """What belongs to the image, without decoding it."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the image in a message; it can be printed, whatever bytes are in a path."""

    @abstractmethod
    def key(self, index: int) -> str:
        """What the image is called in its dataset, wherever that lies and whatever is added to it."""

    def image(self, index: int) -> DecodedImage:
        """The decoded image.

        Raises:
            DataError: It is missing or damaged; the message names it.
        """
        return read_image(self.open(index), self.decoding, self.name(index))

    def load(self, index: int) -> tuple[DecodedImage, Target]:
        """The decoded image and its target."""
        return self.image(index), self.target(index)


class ClassifiedImages(ImageSource[int]):
    """A source of images of one class each.

    A subclass sets `classes` and says the number in `classes` of each image (`label`, and `read_labels` for
    all at once).
    """

    classes: list[str]
    labels_at_hand = True
    """Whether `read_labels` gives what is in memory, instead of reading a file for each."""
    _numbers: list[int] | None = None
    """Of each class of the source, its number among the model's; None where they are the same."""

    @abstractmethod
    def label(self, index: int) -> int:
        """The number of the image's class in the source itself."""

    @abstractmethod
    def read_labels(self) -> NDArray[np.int64]:
        """`label` of every image.

        Raises:
            DataError: They cannot be read, or not without fetching the whole dataset.
        """

    def target(self, index: int) -> int:
        label = self.label(index)
        return label if self._numbers is None else self._numbers[label]

    def labels(self) -> NDArray[np.int64]:
        """`target` of every image, without decoding one.

        Raises:
            DataError: See `read_labels`.
        """
        labels = self.read_labels()
        return labels if self._numbers is None else np.asarray(self._numbers, dtype=np.int64)[labels]

    def use_classes(self, classes: Sequence[str], whose: str = "the model") -> None:
        """Number the classes as a model does, some of which may have no samples here.

        Args:
            classes: The model's.
            whose: Whose they are, for the message: a model's, or those of the training split.

        Raises:
            DataError: The source has samples of other classes.
        """
        classes = list(classes)
        if self.classes == classes:
            return
        number_of = {name: number for number, name in enumerate(classes)}
        counts = np.bincount(self.read_labels(), minlength=len(self.classes))
        extra = [n for n, c in zip(self.classes, counts, strict=True) if n not in number_of and c > 0]
        missing = [name for name in classes if name not in self.classes]
        if extra:
            raise DataError(
                f"{self}: not {whose}'s {len(classes)} classes; missing [{_listed(missing)}], "
                f"extra [{_listed(extra)}]"
            )
        self._numbers = [number_of.get(name, -1) for name in self.classes]
        self.classes = classes

    def report_empty_classes(self) -> None:
        """Log which classes have no samples; nothing where that is not known without reading files."""
        if not self.labels_at_hand:
            return
        counts = np.bincount(self.labels(), minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            log.warning(
                "%s: no samples of %d of %d classes: %s", self, len(empty), len(self.classes), _listed(empty)
            )


def class_weights(labels: NDArray[np.int64], number: int) -> Tensor:
    """Weights by which the classes of a loss count the same: inverse to their frequency, 1 on average.

    Args:
        labels: Of all training samples.
        number: Of classes; those without samples get 1.

    Returns:
        (number,), float32.
    """
    counts = np.bincount(labels, minlength=number).astype(np.float64)
    present = counts > 0
    weights = np.ones(number)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return torch.tensor(weights, dtype=torch.float32)


def _listed(names: Sequence[Any]) -> str:
    shown = ", ".join(map(repr, names[:10]))
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
