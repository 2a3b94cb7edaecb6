"""A folder of class folders in one uncompressed tar, which is never unpacked."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vmamba.data.decoding import RGB, Decoding, is_image_name, printable
from vmamba.data.finding import LeftOut, class_names, is_hidden, sort_key
from vmamba.data.section import ClassificationSection, Split
from vmamba.data.source import ClassifiedImages
from vmamba.data.tar_index import TarReader, index_tars
from vmamba.errors import DataError


class TarImages(ClassifiedImages):
    """An image folder in one uncompressed tar: `[folders/]<class>/…/<image>`.

    Folders that all images have in common, such as one for the split, are ignored; the next one names the
    class. Classes and images have the order that `ImageFolder` gives them when the tar is unpacked, and the
    same files are left out, so that both give the same run.

    Args:
        path: The tar.
        decoding: The format to decode to.

    Raises:
        DataError: The tar is missing, compressed, damaged or without images in class folders.
    """

    def __init__(self, path: str | Path, decoding: Decoding = RGB) -> None:
        self.path, self.decoding = str(path), decoding
        index = index_tars([path])
        left_out = LeftOut()
        images = []
        for number, name in enumerate(index.names):
            if is_image_name(name, decoding):
                images.append((sort_key(name), number))
            else:
                hidden = any(map(is_hidden, name.split("/")))
                left_out.add(LeftOut.HIDDEN if hidden else LeftOut.NO_IMAGE, name)
        samples = _visible(sorted(images), index.names, left_out)
        left_out.report(str(self))
        if not samples:
            raise DataError(
                f"{self}: no images in it; expected files such as *.jpg or *.png in class folders"
            )
        folders: list[str] = []
        labels = []
        for inside, number in samples:
            folder, slash, _ = inside.partition("/")
            if not slash:
                raise DataError(f"{self}: {printable(index.names[number])} lies in no class folder")
            if not folders or folders[-1] != folder:
                folders.append(folder)
            labels.append(len(folders) - 1)
        self.classes = class_names(folders, str(self))
        self._labels = np.array(labels, dtype=np.int64)
        self.numbers = np.array([number for _, number in samples], dtype=np.int64)
        first = index.names[samples[0][1]]
        self._prefix = len(first) - len(samples[0][0])  # length of the folders that all names share
        self.reader = TarReader(index)

    def __str__(self) -> str:
        return printable(self.path)

    def __len__(self) -> int:
        return len(self.numbers)

    def open(self, index: int) -> BytesIO:
        return BytesIO(self.reader.read(self.numbers[index]))

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read_labels(self) -> NDArray[np.int64]:
        return self._labels

    def name(self, index: int) -> str:
        return self.reader.name(self.numbers[index])

    def key(self, index: int) -> str:
        name: str = self.reader.index.names[self.numbers[index]]
        return name[self._prefix :]


def _visible(
    images: list[tuple[bytes, int]], names: Sequence[str], left_out: LeftOut
) -> list[tuple[str, int]]:
    """Path below the common folders, and number, of each image that is not hidden below them.

    Args:
        images: Sort key and number of each, in order.
        names: Names by number.
        left_out: Counts the images with a hidden file or folder in their paths.
    """
    prefix = _common_folders(images, names)
    visible = []
    for key, number in images:
        if any(map(is_hidden, names[number][prefix:].split("/"))):
            left_out.add(LeftOut.HIDDEN, names[number])
        else:
            visible.append((key, number))
    prefix = _common_folders(visible, names)  # may be longer now that hidden folders are gone
    return [(names[number][prefix:], number) for _, number in visible]


def _common_folders(images: list[tuple[bytes, int]], names: Sequence[str]) -> int:
    """Length of the folders that all images share, without the last one if it names their only class."""
    if not images:
        return 0
    first, last = (names[images[i][1]].split("/")[:-1] for i in (0, -1))
    depth = 0
    while depth < min(len(first), len(last)) and first[depth] == last[depth]:
        depth += 1
    depth = min(depth, max(0, len(first) - 1))
    return sum(len(folder) + 1 for folder in first[:depth])


class TarSection(ClassificationSection):
    """A folder with an uncompressed tar for each split."""

    source: Literal["tar"] = "tar"

    def open_split(self, split: Split, decoding: Decoding) -> TarImages:
        return TarImages(Path(self._root()) / self._split_name(split), decoding)
