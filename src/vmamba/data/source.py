"""Base classes of all sources of images, whatever their targets are.

A source of images with targets other than classes (boxes, masks) subclasses `ImageSource` and implements
`open` (the encoded image) and `target`. Decoding, order, and errors are shared.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmamba.data.classes import class_difference
from vmamba.data.decoding import RGB, DecodedImage, Decoding, read_oriented
from vmamba.data.sampling import SampleGroups
from vmamba.errors import DataError
from vmamba.words import counted, listed

log = logging.getLogger(__name__)

Target = TypeVar("Target")


class ImageSource(ABC, Generic[Target]):
    """Images and their targets, by index; `str` of a source gives its place, for messages."""

    decoding: Decoding = RGB
    groups: SampleGroups | None = None
    """Samples that should be read together, if any."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def open(self, index: int) -> str | Path | BinaryIO:
        """The encoded image: a path, or an open file."""

    @abstractmethod
    def target(self, index: int) -> Target:
        """The image's target, without decoding the image."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The image's name for messages; printable whatever bytes its path contains."""

    @abstractmethod
    def key(self, index: int) -> str:
        """The image's name in its dataset, which does not change if the dataset is moved or extended."""

    def image(self, index: int) -> DecodedImage:
        """The decoded image.

        Raises:
            DataError: It is missing or damaged; the message names it.
        """
        return self.oriented(index)[0]

    def oriented(self, index: int) -> tuple[DecodedImage, int]:
        """The decoded image, and the orientation of EXIF by which it was turned upright.

        Raises:
            DataError: It is missing or damaged; the message names it.
        """
        return read_oriented(self.open(index), self.decoding, self.name(index))

    def load(self, index: int) -> tuple[DecodedImage, Target]:
        """The decoded image and its target."""
        return self.image(index), self.target(index)


class ClassifiedImages(ImageSource[int]):
    """A source of images of one class each.

    A subclass sets `classes` and implements `label`, an image's index in `classes`, and `read_labels` for all
    images at once.
    """

    classes: list[str]
    labels_at_hand = True
    """Whether the labels are in memory, so that `read_labels` need not read a file for each."""
    _numbers: list[int] | None = None
    """For each class of the source, its number among the model's; None if they are the same."""

    @abstractmethod
    def label(self, index: int) -> int:
        """The image's class, as an index into the source's own classes."""

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
        """Renumber the classes as a model does; some of the model's may have no samples here.

        Args:
            classes: The model's classes.
            whose: Whose classes they are, for the message, such as "the model".

        Raises:
            DataError: The source has samples of other classes.
        """
        classes = list(classes)
        if self.classes == classes:
            return
        number_of = {name: number for number, name in enumerate(classes)}
        counts = np.bincount(self.read_labels(), minlength=len(self.classes))
        extra = [n for n, c in zip(self.classes, counts, strict=True) if n not in number_of and c > 0]
        if extra:
            present = [name for name in self.classes if name in number_of or name in extra]
            raise DataError(
                f"{self}: not {whose}'s {counted(len(classes), 'class', 'classes')}; "
                f"{class_difference(present, classes)}"
            )
        self._numbers = [number_of.get(name, -1) for name in self.classes]
        self.classes = classes

    def report_empty_classes(self) -> None:
        """Log which classes have no samples, unless finding that out would read a file for each label."""
        if not self.labels_at_hand:
            return
        counts = np.bincount(self.labels(), minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            log.warning(
                "%s: no samples of %d of %d classes: %s", self, len(empty), len(self.classes), listed(empty)
            )


def class_weights(labels: NDArray[np.int64], number: int) -> Tensor:
    """Weights that make the classes count the same in a loss: inverse to their frequency, 1 on average.

    Args:
        labels: The labels of all training samples.
        number: The number of classes; those without samples get weight 1.

    Returns:
        (number,), float32.
    """
    counts = np.bincount(labels, minlength=number).astype(np.float64)
    present = counts > 0
    weights = np.ones(number)
    weights[present] = len(labels) / (present.sum() * counts[present])
    return torch.tensor(weights, dtype=torch.float32)


def image_size(image: DecodedImage) -> tuple[int, int]:
    """Height and width of a decoded image."""
    if isinstance(image, Tensor):
        return image.shape[-2], image.shape[-1]
    return image.height, image.width
