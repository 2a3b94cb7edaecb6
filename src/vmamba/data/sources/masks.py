"""Folders of images and of masks, whose pixels are numbers of classes.

Letters in shapes: h height, w width.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from vmamba.data.classes import read_classes
from vmamba.data.decoding import RGB, Decoding, printable, without_warnings
from vmamba.data.finding import LeftOut, find_images
from vmamba.data.section import SegmentationSection, Split
from vmamba.data.segmented import SegmentedImages
from vmamba.data.strings import PackedStrings
from vmamba.errors import DataError, RecipeError
from vmamba.labels import IGNORED
from vmamba.words import counted, listed

_VALUES = 2**16
"""PNG has values of up to 16 bits."""
_HEADER = 26
"""Bytes of a PNG up to its bit depth and colour type."""


class MaskValues:
    """What the values in mask files mean.

    Args:
        names: The class of each value: by value, or those of 0, 1, ….
        ignored: Values of pixels that do not count; they are no classes.

    Attributes:
        classes: The classes that are not ignored, in the order of their values.

    Raises:
        DataError: There are no classes, more than 255, or two of one name.
    """

    def __init__(self, names: dict[int, str] | Sequence[str], ignored: Sequence[int] = (IGNORED,)) -> None:
        named = dict(names) if isinstance(names, dict) else dict(enumerate(names))
        kept = sorted(set(named) - set(ignored))
        self.classes = [named[value] for value in kept]
        if not 0 < len(kept) <= IGNORED or len(set(self.classes)) < len(kept) or not all(self.classes):
            raise DataError(
                f"data.classes: expected 1 to {IGNORED} classes, each of its own name, got "
                f"{len(kept)}: [{listed(self.classes)}]"
            )
        self._labels = np.full(_VALUES, -1, dtype=np.int16)
        self._labels[kept] = np.arange(len(kept))
        self._labels[list(ignored)] = IGNORED

    def labels(self, values: NDArray[Any], name: str) -> NDArray[np.uint8]:
        """The label map of a mask file's values, (h, w).

        Raises:
            DataError: A value is neither a class nor ignored.
        """
        labels = self._labels[values]
        if (labels < 0).any():
            unknown = np.unique(values[labels < 0]).tolist()
            raise DataError(
                f"{name}: pixels of the value {listed(unknown)}, which is none of the "
                f"{counted(len(self.classes), 'class', 'classes')}; name it in data.classes, or add it to "
                "data.ignore"
            )
        return labels.astype(np.uint8)


class MaskFolder(SegmentedImages):
    """`<images>/…/<stem>.<suffix>` and for each `<masks>/…/<stem>.png`, whose pixels are numbers of classes.

    Masks are gray, or have a palette, whose colours do not matter.

    Args:
        images: The folder of a split's images.
        masks: The folder of its masks.
        values: What the pixels of masks mean.
        decoding: The format to decode images to.

    Raises:
        DataError: A folder is missing or empty, or an image without a mask, or a mask without an image.
    """

    def __init__(
        self, images: str | Path, masks: str | Path, values: MaskValues, decoding: Decoding = RGB
    ) -> None:
        self.root, self.masks, self.values, self.decoding = Path(images), Path(masks), values, decoding
        self.classes = values.classes
        for folder, holds in ((self.root, "images"), (self.masks, "masks")):
            if not folder.is_dir():
                raise DataError(f"{printable(folder)}: no such folder of {holds}")
        left_out = LeftOut()
        paths = find_images(str(images), left_out, decoding)
        left_out.report(str(self))
        if not paths:
            raise DataError(f"{self}: no images in it")
        self._pair(paths)
        self.paths = PackedStrings.of(paths)

    def _pair(self, paths: Sequence[str]) -> None:
        """Check that each image has one mask, and each mask an image."""
        left_out = LeftOut()
        files = find_images(str(self.masks), left_out)
        masks = {os.path.splitext(path)[0] for path in files if path.endswith(".png")}
        images: dict[str, str] = {}
        for path in paths:
            stem = os.path.splitext(path)[0]
            if stem in images:
                raise DataError(
                    f"{self}: two images for one mask, {printable(images[stem])} and {printable(path)}"
                )
            images[stem] = path
        without = [printable(path) for stem, path in images.items() if stem not in masks]
        if without:
            raise DataError(
                f"{printable(self.masks)}: no mask for {counted(len(without), 'image')} of {self}: "
                f"{listed(without)}; expected {printable(os.path.splitext(without[0])[0])}.png"
            )
        alone = [printable(f"{stem}.png") for stem in sorted(masks - images.keys())]
        if alone:
            raise DataError(
                f"{self}: no image for {counted(len(alone), 'mask')} of {printable(self.masks)}: "
                f"{listed(alone)}"
            )

    def __str__(self) -> str:
        return printable(self.root)

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, index: int) -> Path:
        return self.root / self.paths[index]

    def target(self, index: int) -> NDArray[np.uint8]:
        path = (self.masks / self.paths[index]).with_suffix(".png")
        name = printable(path)
        return self.values.labels(read_mask(path, name), name)

    def name(self, index: int) -> str:
        return printable(self.open(index))

    def key(self, index: int) -> str:
        path: str = self.paths[index]
        return path


def read_mask(path: str | Path, name: str) -> NDArray[Any]:
    """The values of a mask's pixels, (h, w): gray of up to 16 bits, or indices into its palette.

    Args:
        path: Of a PNG file.
        name: Its name for messages.

    Raises:
        DataError: It is missing, damaged, or coloured.
    """
    try:
        with open(path, "rb") as file:
            depth = file.read(_HEADER)[-2]
            file.seek(0)
            with without_warnings(name), Image.open(file, formats=("PNG",)) as image:
                image.load()
                values = np.asarray(image)
                mode = image.mode
    except FileNotFoundError:
        raise DataError(f"{name}: no such mask") from None
    except MemoryError:
        raise
    except Exception as error:  # on damaged bytes Pillow's decoders raise any exception
        raise DataError(f"{name}: not a mask in PNG format, or a damaged one ({error})") from error
    if values.ndim != 2:
        raise DataError(
            f"{name}: a mask in colour ({mode}), not numbers of classes, as gray or a palette; write the "
            "number of each colour into an array of uint8, and save it with PIL.Image.fromarray"
        )
    if mode == "L" and depth in (2, 4):  # Pillow spreads these values over 0 to 255
        values = values // (255 // (2**depth - 1))
    return values.astype(np.uint16)


class MasksSection(SegmentationSection):
    """Folders of images and of masks, `images/<split>/…` and `masks/<split>/…`."""

    source: Literal["masks"] = "masks"
    images: str = Field(default="images", description="the folder below root with a folder of images a split")
    masks: str = Field(default="masks", description="the same for masks: PNG files named as the images")
    classes: list[str] | str | None = Field(
        default=None,
        description="names of the values 0, 1, … in masks; or a file of them, below root or not: a name a "
        "line, or JSON, a list or an object with the value of each name",
    )
    ignore: int | list[int] = Field(default=255, description="values of pixels that do not count")
    reduce_zero_label: bool = Field(
        default=False, description="ignore 0; classes names the values 1, 2, …, as in ADE20K"
    )

    def open(self, split: Split, decoding: Decoding = RGB) -> MaskFolder:
        root = Path(self._root())
        name = self._split_name(split)
        return MaskFolder(root / self.images / name, root / self.masks / name, self._values(root), decoding)

    def _values(self, root: Path) -> MaskValues:
        if self.classes is None:
            raise RecipeError("data.classes: missing; set it to the names of the classes, or a file of them")
        names = self.classes if isinstance(self.classes, list) else _read_names(root / self.classes)
        ignored = [self.ignore] if isinstance(self.ignore, int) else self.ignore
        outside = [value for value in ignored if not 0 <= value < _VALUES]
        if outside:
            raise RecipeError(f"data.ignore: expected values from 0 to {_VALUES - 1}, got {outside[0]}")
        if not self.reduce_zero_label:
            return MaskValues(names, ignored)
        if isinstance(names, list):
            names = dict(enumerate(names, start=1))
        return MaskValues(names, [0, *ignored])


def _read_names(path: Path) -> dict[int, str] | list[str]:
    """Names of classes from a text file or a JSON file."""
    if path.suffix.lower() != ".json":
        return read_classes(path)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{printable(path)}: cannot read the names of the classes ({error})") from None
    by_value = isinstance(names, dict) and all(key.isdecimal() and int(key) < _VALUES for key in names)
    values = names.values() if by_value else names if isinstance(names, list) else [None]
    if not all(isinstance(name, str) for name in values):
        raise DataError(
            f'{printable(path)}: expected a list of names, or an object such as {{"0": "road", "1": "car"}}'
        )
    return {int(value): name for value, name in names.items()} if by_value else names
