"""The base class of sources of images with annotated objects."""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmamba.data.classes import class_difference
from vmamba.data.decoding import DecodedImage
from vmamba.data.objects import Objects
from vmamba.data.orientation import turn_of_target
from vmamba.data.source import ImageSource, image_size
from vmamba.errors import DataError
from vmamba.words import counted, listed

log = logging.getLogger(__name__)


class AnnotatedImages(ImageSource[Objects]):
    """A source of images with objects: a box, a class and a mask each.

    A subclass sets `classes` and `category_ids` and implements `objects`, `size`, `has_objects` and
    `class_counts`.

    Attributes:
        classes: Their names.
        category_ids: The number of each class in the annotation file.
    """

    classes: list[str]
    category_ids: list[int]
    _numbers: Tensor | None = None
    """For each class of the source, its number among the model's; None if they are the same."""

    @abstractmethod
    def objects(self, index: int) -> Objects:
        """The image's objects as annotated, with labels that are indices into the source's own classes."""

    @abstractmethod
    def size(self, index: int) -> tuple[int, int]:
        """Height and width as annotated, without decoding the image."""

    @abstractmethod
    def has_objects(self, index: int) -> bool:
        """Whether an object that is no crowd is on the image."""

    @abstractmethod
    def class_counts(self) -> NDArray[np.int64]:
        """The number of objects of each of the source's own classes."""

    def target(self, index: int) -> Objects:
        """The image's objects, crowds included, in the frame of the annotation file; `load` turns them."""
        return self.renumbered(self.objects(index))

    def renumbered(self, objects: Objects) -> Objects:
        """Objects with the model's labels instead of the source's own; see `use_classes`."""
        return objects if self._numbers is None else replace(objects, labels=self._numbers[objects.labels])

    def load(self, index: int) -> tuple[DecodedImage, Objects]:
        """The upright image, and its objects turned along with it.

        Objects annotated for the size of the stored pixels are taken to be in their frame; those that fit the
        upright image alone are upright already.

        Raises:
            DataError: The image is missing or damaged, or of another size than annotated.
        """
        (image, orientation), objects = self.oriented(index), self.target(index)
        name = f"{self.name(index)} (image {objects.image_id} of {self})"
        return image, objects.turned(turn_of_target(orientation, image_size(image), objects.size, name))

    def use_classes(self, classes: Sequence[str], whose: str = "the model") -> None:
        """Renumber the classes as a model does; some of the model's may have no objects here.

        Classes that the annotation file lacks get numbers that it does not use.

        Args:
            classes: The model's classes.
            whose: Whose classes they are, for the message, such as "the model".

        Raises:
            DataError: The source has objects of other classes.
        """
        classes = list(classes)
        if self.classes == classes:
            return
        number_of = {name: number for number, name in enumerate(classes)}
        counts = self.class_counts()
        extra = [n for n, c in zip(self.classes, counts, strict=True) if n not in number_of and c > 0]
        missing = [name for name in classes if name not in self.classes]
        if extra:
            present = [name for name in self.classes if name in number_of or name in extra]
            raise DataError(
                f"{self}: not {whose}'s {counted(len(classes), 'class', 'classes')}; "
                f"{class_difference(present, classes)}"
            )
        id_of = dict(zip(self.classes, self.category_ids, strict=True))
        first_unused = max(self.category_ids) + 1
        ids_of_missing = {name: first_unused + position for position, name in enumerate(missing)}
        self._numbers = torch.tensor([number_of.get(name, -1) for name in self.classes])
        self.category_ids = [{**ids_of_missing, **id_of}[name] for name in classes]
        self.classes = classes

    def report_empty_classes(self) -> None:
        """Log which classes have no objects."""
        counts = self.class_counts()
        if self._numbers is not None:
            present = set(self._numbers[torch.from_numpy(counts) > 0].tolist())
        else:
            present = set(np.flatnonzero(counts).tolist())
        empty = [name for number, name in enumerate(self.classes) if number not in present]
        if empty:
            log.warning(
                "%s: no objects of %d of %d classes: %s", self, len(empty), len(self.classes), listed(empty)
            )
