"""Image data sets of the Hugging Face hub, or in its format."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vmamba.data.classification import ImageSource, read_image
from vmamba.errors import DataError


class HuggingFaceImages(ImageSource):
    """A split of a data set that the package `datasets` reads.

    Args:
        root: A folder that `save_to_disk` wrote, or what `load_dataset` takes: a folder, or a name of the
            hub, from where it is downloaded.
        split: Its name.
        image_column: The images.
        label_column: Whole numbers from 0, with names if the column has them.
        classes: Names, for a column without.
        mode: "RGB" or "L".

    Raises:
        DataError: `datasets` is not installed, or the set, the split or a column is missing or not of its
            kind.
    """

    def __init__(
        self,
        root: str,
        split: str,
        *,
        image_column: str = "image",
        label_column: str = "label",
        classes: list[str] | None = None,
        mode: str = "RGB",
    ) -> None:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                "Hugging Face data sets need the package datasets: pip install 'vmamba[data]'"
            ) from error
        self.where, self.mode = f"{root}[{split}]", mode
        saved = any((Path(root) / name).exists() for name in ("state.json", "dataset_dict.json"))
        try:
            data: Any = datasets.load_from_disk(root) if saved else datasets.load_dataset(root, split=split)
        except Exception as error:  # it raises many kinds
            raise DataError(f"{self.where}: cannot load the data set ({error})") from error
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise DataError(f"{root}: no split {split!r}; there are {', '.join(map(repr, data))}")
            data = data[split]
        for key, column in (("image", image_column), ("label", label_column)):
            if column not in data.features:
                raise DataError(
                    f"{self.where}: no column {column!r}; set data.{key}_column to one of "
                    f"{', '.join(map(repr, data.features))}"
                )
        if not isinstance(data.features[image_column], datasets.Image):
            raise DataError(f"{self.where}: column {image_column!r} holds no images")
        feature = data.features[label_column]
        try:
            labels = np.asarray(data.with_format("arrow")[label_column].to_numpy())
            whole = np.issubdtype(labels.dtype, np.integer) and len(labels) > 0 and labels.min() >= 0
        except (TypeError, ValueError, AttributeError):
            whole = False
        if not whole:
            raise DataError(
                f"{self.where}: column {label_column!r} holds no labels, whole numbers from 0 (test splits "
                "of the hub often have none; class_encode_column makes them of names)"
            )
        if isinstance(feature, datasets.ClassLabel):
            classes = list(feature.names)
        elif classes is None:
            classes = [str(number) for number in range(labels.max() + 1)]
        if labels.max() >= len(classes):
            raise DataError(f"{self.where}: label {labels.max()} of {len(classes)} classes")
        self.classes, self.labels, self.image_column = classes, labels.astype(np.int32), image_column
        self.images = data.select_columns(image_column).cast_column(
            image_column, datasets.Image(decode=False)
        )

    def __str__(self) -> str:
        return self.where

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        stored = self.images[index][self.image_column] or {}
        if stored.get("bytes") is None and stored.get("path") is None:
            raise DataError(f"{self.name(index)}: no image")
        file = stored["path"] if stored.get("bytes") is None else BytesIO(stored["bytes"])
        return read_image(file, self.mode, self.name(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.where}: row {index}"
