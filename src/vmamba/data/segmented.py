"""The base class of sources of images with a class for each pixel.

Letters in shapes: h height, w width.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vmamba.data.classes import class_difference
from vmamba.data.decoding import DecodedImage
from vmamba.data.orientation import turn_of_target, turned_pixels
from vmamba.data.source import ImageSource, image_size
from vmamba.errors import DataError
from vmamba.words import counted


class SegmentedImages(ImageSource[NDArray[np.uint8]]):
    """A source of images and their label maps, (h, w) uint8: indices into `classes`, or 255 for none.

    A subclass sets `classes` and implements `target`.
    """

    classes: list[str]

    def load(self, index: int) -> tuple[DecodedImage, NDArray[np.uint8]]:
        """The upright image, and its label map turned along with it.

        A label map of the size of the stored pixels is taken to be in their frame; one that fits the upright
        image alone is upright already.

        Raises:
            DataError: The image or the label map is missing or damaged, or they differ in size.
        """
        (image, orientation), labels = self.oriented(index), self.target(index)
        height, width = labels.shape
        turn = turn_of_target(orientation, image_size(image), (height, width), self.name(index))
        return image, turned_pixels(labels, turn)

    def use_classes(self, classes: Sequence[str], whose: str = "the model") -> None:
        """Check that the classes are a model's, in the same order.

        Args:
            classes: The model's classes.
            whose: Whose classes they are, for the message, such as "the model".

        Raises:
            DataError: They differ.
        """
        classes = list(classes)
        if self.classes == classes:
            return
        raise DataError(
            f"{self}: not {whose}'s {counted(len(classes), 'class', 'classes')}; "
            f"{class_difference(self.classes, classes)}"
        )
