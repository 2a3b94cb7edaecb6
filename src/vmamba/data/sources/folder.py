"""A folder of class folders.

Not torchvision's `ImageFolder`, because that reads hidden folders, has an order that a tar of the folder
cannot reproduce, and fails on names that are not UTF-8 when they are printed.
"""

import os
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vmamba.data.decoding import RGB, Decoding, printable
from vmamba.data.finding import LeftOut, class_folders, class_names, find_images
from vmamba.data.section import ClassificationSection, Split
from vmamba.data.source import ClassifiedImages
from vmamba.data.strings import PackedStrings
from vmamba.errors import DataError


class ImageFolder(ClassifiedImages):
    """`root/<class>/…/<image>`; classes are numbered in the order of their names.

    Hidden files and folders, files without an image's suffix, and files outside of class folders are left
    out; how many of each is logged. Links are followed, see `find_images`.

    Args:
        root: The folder of the split.
        decoding: The format to decode to.
        allow_empty: Whether a class folder may hold no images; such classes are logged.

    Raises:
        DataError: The folder is missing or has no class folders, or a class folder has no images or cannot
            be read.
    """

    def __init__(self, root: str | Path, decoding: Decoding = RGB, *, allow_empty: bool = False) -> None:
        self.root, self.decoding = Path(root), decoding
        if not self.root.is_dir():
            raise DataError(f"{self}: no such folder; expected one with a folder for each class")
        left_out = LeftOut()
        folders = class_folders(str(root), left_out)
        if not folders:
            raise DataError(f"{self}: no class folders in it; expected {self}/<class>/<image>")
        self.classes = class_names(folders, str(self))
        paths: list[str] = []
        labels: list[int] = []
        for number, folder in enumerate(folders):
            images = find_images(os.path.join(root, folder), left_out, decoding)
            if not images and not allow_empty:
                raise DataError(
                    f"{printable(self.root / folder)}: no images in this class folder; expected files "
                    "such as *.jpg or *.png; remove the folder if there is no such class"
                )
            paths += [f"{folder}/{path}" for path in images]
            labels += [number] * len(images)
        left_out.report(str(self))
        if not paths:
            raise DataError(f"{self}: no images in any of its {len(folders)} class folders")
        self.paths = PackedStrings.of(paths)
        self._labels = np.array(labels, dtype=np.int64)

    def __str__(self) -> str:
        return printable(self.root)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """The path of the image's file."""
        return self.root / self.paths[index]

    def open(self, index: int) -> Path:
        return self.path(index)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read_labels(self) -> NDArray[np.int64]:
        return self._labels

    def name(self, index: int) -> str:
        return printable(self.path(index))

    def key(self, index: int) -> str:
        path: str = self.paths[index]
        return path


class FolderSection(ClassificationSection):
    """A folder with a subfolder for each split, which holds a folder of images for each class."""

    source: Literal["folder"] = "folder"

    def open_split(self, split: Split, decoding: Decoding) -> ImageFolder:
        root = Path(self._root())
        path = root / self._split_name(split)
        if root.is_dir() and not path.is_dir():
            raise DataError(
                f"{printable(path)}: no such folder; expected one with a folder for each class, or "
                f"data.val_fraction=0.2 to hold back a fifth of {printable(root)}/<class>/<image>"
            )
        return ImageFolder(path, decoding, allow_empty=self._split_name(split) == self.val_split)

    def open_all(self, decoding: Decoding) -> ImageFolder:
        """The training split, or the root itself if there is no folder of that name."""
        root = Path(self._root())
        stored = root / self.train_split
        return ImageFolder(stored if stored.is_dir() else root, decoding)
