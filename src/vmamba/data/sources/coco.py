"""A file of annotations in COCO's instance format, and a folder of images."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from vmamba.data.annotated import AnnotatedImages
from vmamba.data.coco_format import read_instances
from vmamba.data.decoding import RGB, DecodedImage, Decoding, printable
from vmamba.data.objects import Objects, run_lengths
from vmamba.data.section import DetectionSection, Split
from vmamba.errors import DataError


class CocoImages(AnnotatedImages):
    """Images, and the objects that a file in COCO's instance format says are on them.

    Images are in the order of the file, classes in that of the categories' ids. What is left out of the file
    or refused: see `read_instances`.

    Args:
        folder: Of the images.
        annotations: The path of the annotation file.
        decoding: The format to decode to.

    Raises:
        DataError: The folder is missing, or the annotation file is missing or refused.
    """

    def __init__(self, folder: str | Path, annotations: str | Path, decoding: Decoding = RGB) -> None:
        self.folder, self.annotations, self.decoding = Path(folder), Path(annotations), decoding
        if not self.folder.is_dir():
            raise DataError(f"{printable(self.folder)}: no such folder of images")
        self._all = read_instances(annotations)
        self.classes, self.category_ids = self._all.classes, self._all.category_ids
        # The annotations image by image, and where each image's end.
        self._order = np.argsort(self._all.image_of, kind="stable").astype(np.int32)
        self._ends = np.cumsum(np.bincount(self._all.image_of, minlength=len(self)))
        height, width = self._all.sizes[self._all.image_of].T
        left, top, right, bottom = self._all.boxes.T
        inside = (left < width) & (top < height) & (right > 0) & (bottom > 0)
        real = self._all.image_of[~self._all.crowd & inside]
        self._has_objects = np.bincount(real, minlength=len(self)) > 0

    def __str__(self) -> str:
        return printable(self.annotations)

    def __len__(self) -> int:
        return len(self._all.image_ids)

    def open(self, index: int) -> Path:
        return self.folder / self._all.file_names[index]

    def oriented(self, index: int) -> tuple[DecodedImage, int]:
        try:
            return super().oriented(index)
        except DataError as error:
            raise DataError(f"{error} (image {self._all.image_ids[index]} of {self})") from error

    def name(self, index: int) -> str:
        return printable(self.open(index))

    def key(self, index: int) -> str:
        file: str = self._all.file_names[index]
        return file

    def size(self, index: int) -> tuple[int, int]:
        height, width = self._all.sizes[index].tolist()
        return height, width

    def has_objects(self, index: int) -> bool:
        return bool(self._has_objects[index])

    def class_counts(self) -> NDArray[np.int64]:
        return np.bincount(self._all.labels, minlength=len(self._all.classes))

    def objects(self, index: int) -> Objects:
        rows = self._order[self._ends[index - 1] if index else 0 : self._ends[index]]
        size = self.size(index)
        masks = [self._all.outlines.code(row, size) for row in rows.tolist()]
        areas = self._all.areas[rows]
        for position in np.flatnonzero(np.isnan(areas)).tolist():
            areas[position] = run_lengths().area(masks[position])
        return Objects(
            image_id=int(self._all.image_ids[index]),
            size=size,
            boxes=torch.from_numpy(self._all.boxes[rows]),
            labels=torch.from_numpy(self._all.labels[rows].astype(np.int64)),
            masks=masks,
            areas=torch.from_numpy(areas),
            crowd=torch.from_numpy(self._all.crowd[rows]),
            ids=self._all.ids[rows].tolist(),
        )


class CocoSection(DetectionSection):
    """Folders of images, and for each a file of annotations in COCO's instance format."""

    source: Literal["coco"] = "coco"
    train_split: str = "train2017"
    val_split: str = "val2017"
    train_annotations: str = Field(
        default="annotations/instances_train2017.json", description="a path, or one below root"
    )
    val_annotations: str = Field(
        default="annotations/instances_val2017.json", description="a path, or one below root"
    )

    def open(self, split: Split, decoding: Decoding = RGB) -> CocoImages:
        root = Path(self._root())
        annotations = Path(self.train_annotations if split == "train" else self.val_annotations)
        return CocoImages(root / self._split_name(split), root / annotations.expanduser(), decoding)

    def without_training_split(self) -> "CocoSection":
        section = super().without_training_split()
        return section.model_copy(update={"train_annotations": self.val_annotations})
