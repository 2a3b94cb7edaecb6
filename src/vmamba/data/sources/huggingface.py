"""Image datasets of the Hugging Face hub, or in its format.

The package `datasets` finds, downloads and stores the data; this file reads samples by index, so that a run
can be resumed in the middle of an epoch, and names the row in errors.
"""

from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vmamba.data.classes import read_classes
from vmamba.data.decoding import RGB, Decoding
from vmamba.data.section import ClassificationSection, Split
from vmamba.data.source import ClassifiedImages
from vmamba.errors import DataError
from vmamba.words import counted


class HuggingFaceImages(ClassifiedImages):
    """A split of a dataset that the package `datasets` reads.

    Args:
        root: A folder that `save_to_disk` wrote, or an argument of `load_dataset`: a folder, or a name on the
            hub, from where it is downloaded.
        split: Name of the split.
        image_column: Name of the column of images.
        label_column: Name of the column of labels: whole numbers from 0, with class names if it has them.
        classes: Class names, if the column has none.
        decoding: The format to decode to.

    Raises:
        DataError: `datasets` is not installed, or the dataset, the split or a column is missing or of the
            wrong type.
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        image_column: str = "image",
        label_column: str = "label",
        classes: list[str] | None = None,
        decoding: Decoding = RGB,
    ) -> None:
        self.where, self.decoding, self.image_column = f"{root}[{split}]", decoding, image_column
        data = self._open_dataset(root, split)
        for key, column in (("image", image_column), ("label", label_column)):
            if column not in data.features:
                raise DataError(
                    f"{self.where}: no column {column!r}; set data.{key}_column to one of "
                    f"{', '.join(map(repr, data.features))}"
                )
        self.images = self._encoded_images(data)
        self._labels = self._read_labels(data, label_column)
        names = getattr(data.features[label_column], "names", None)
        number = int(self._labels.max()) + 1
        self.classes = list(names or classes or map(str, range(number)))
        if number > len(self.classes):
            there = counted(len(self.classes), "class", "classes")
            raise DataError(f"{self.where}: label {number - 1} of {there}")

    def _open_dataset(self, root: str, split: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                "Hugging Face datasets need the package datasets: pip install 'vmamba[data]'"
            ) from error
        saved = any((Path(root) / name).exists() for name in ("state.json", "dataset_dict.json"))
        try:
            data: Any = datasets.load_from_disk(root) if saved else datasets.load_dataset(root, split=split)
        except Exception as error:  # `datasets` raises many types
            raise DataError(f"{self.where}: cannot load the dataset ({error})") from error
        if not isinstance(data, datasets.DatasetDict):
            return data
        if split not in data:
            raise DataError(f"{root}: no split {split!r}; there are {', '.join(map(repr, data))}")
        return data[split]

    def _encoded_images(self, data: Any) -> Any:
        import datasets

        if not isinstance(data.features[self.image_column], datasets.Image):
            raise DataError(f"{self.where}: column {self.image_column!r} holds no images")
        images = data.select_columns(self.image_column)
        return images.cast_column(self.image_column, datasets.Image(decode=False))

    def _read_labels(self, data: Any, column: str) -> NDArray[np.int64]:
        try:
            labels = np.asarray(data.with_format("arrow")[column].to_numpy())
            whole = np.issubdtype(labels.dtype, np.integer) and len(labels) > 0 and labels.min() >= 0
        except (TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise DataError(
                f"{self.where}: column {column!r} holds no labels, whole numbers from 0 (test splits "
                "of the hub often have none; class_encode_column makes them of names)"
            )
        return labels.astype(np.int64)

    def __str__(self) -> str:
        return self.where

    def __len__(self) -> int:
        return len(self._labels)

    def open(self, index: int) -> str | BytesIO:
        stored = self.images[index][self.image_column] or {}
        content, path = stored.get("bytes"), stored.get("path")
        if content is None and path is None:
            raise DataError(f"{self.name(index)}: no image")
        return BytesIO(content) if content is not None else str(path)

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def read_labels(self) -> NDArray[np.int64]:
        return self._labels

    def name(self, index: int) -> str:
        return f"{self.where}: row {index}"

    def key(self, index: int) -> str:
        return str(index)


class HuggingFaceSection(ClassificationSection):
    """A dataset that `load_from_disk` or `load_dataset` of the package `datasets` can read."""

    source: Literal["huggingface"] = "huggingface"
    classes: str | int | None = Field(
        default=None,
        description="for a column without names: a text file with a name a line, or the number of classes",
    )
    image_column: str = "image"
    label_column: str = "label"

    @model_validator(mode="after")
    def _some_classes(self) -> "HuggingFaceSection":
        if isinstance(self.classes, int) and self.classes < 1:
            raise ValueError(f"classes: expected at least 1, got {self.classes}")
        return self

    def open_split(self, split: Split, decoding: Decoding) -> HuggingFaceImages:
        return HuggingFaceImages(
            self._root(),
            self._split_name(split),
            image_column=self.image_column,
            label_column=self.label_column,
            classes=None if self.classes is None else read_classes(self.classes),
            decoding=decoding,
        )
