"""The annotated objects of an image.

Letters in shapes: n objects, h height, w width.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmamba.data.orientation import swaps_sides, turned_boxes, turned_pixels
from vmamba.errors import DataError


def run_lengths() -> Any:
    """The module `pycocotools.mask`, which makes and reads COCO's run-length codes.

    Raises:
        DataError: It is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError as error:
        raise DataError("masks need pycocotools: pip install 'vmamba[train]'") from error
    return mask


@dataclass(frozen=True)
class Objects:
    """The annotated objects of one image.

    From `AnnotatedImages.load` they are in the frame of the upright image.

    Attributes:
        image_id: Of the image in the annotation file.
        size: Height and width of the image.
        boxes: (n, 4) float32, left, top, right and bottom in pixels as annotated: not empty, but they may
            reach over the image's border.
        labels: (n,) int64, from 0: indices into the source's classes.
        masks: A run-length code of COCO for each, `{"size": [h, w], "counts": bytes}`; see `run_lengths`.
        areas: (n,) float32, in pixels, as annotated; of the mask where the file has none.
        crowd: (n,) bool: regions of many objects, which evaluation ignores.
        ids: Of the annotations in the file.
    """

    image_id: int
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    masks: list[dict[str, Any]]
    areas: Tensor
    crowd: Tensor
    ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def decoded_masks(self) -> Tensor:
        """The masks, (n, h, w) uint8, 1 inside of the object."""
        return decoded_masks(self.masks, self.size)

    def select(self, chosen: Tensor) -> "Objects":
        """Those objects where `chosen`, (n,) bool, is true."""
        indices = chosen.nonzero().flatten().tolist()
        return replace(
            self,
            boxes=self.boxes[chosen],
            labels=self.labels[chosen],
            masks=[self.masks[i] for i in indices],
            areas=self.areas[chosen],
            crowd=self.crowd[chosen],
            ids=[self.ids[i] for i in indices],
        )

    def turned(self, orientation: int) -> "Objects":
        """The objects of the stored image turned upright by EXIF's orientation, as the image is."""
        if orientation == 1:
            return self
        masks = []
        for code in self.masks:  # one at a time: those of a crowded photo take a gigabyte
            pixels = turned_pixels(decoded_masks([code], self.size).numpy(), orientation)
            masks += encoded_masks(pixels)
        return replace(
            self,
            size=self.size[::-1] if swaps_sides(orientation) else self.size,
            boxes=turned_boxes(self.boxes, self.size, orientation),
            masks=masks,
        )

    def to(self, device: Any, non_blocking: bool = False) -> "Objects":
        """Itself: the truth stays in the memory of the CPU, where evaluation uses it.

        Lightning calls this for the members of a batch; it refuses frozen dataclasses that lack it.
        """
        return self


def encoded_masks(masks: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
    """COCO's run-length codes of masks, each (h, w), not 0 inside of the object."""
    encode = run_lengths().encode
    return [encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]


def decoded_masks(codes: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> Tensor:
    """The masks of COCO's run-length codes, (n, h, w) uint8, 1 inside of the object.

    Args:
        codes: n codes.
        size: h and w.
    """
    if not codes:
        return torch.zeros(0, *size, dtype=torch.uint8)
    with warnings.catch_warnings():  # pycocotools 2.0.11 with NumPy 2
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        decoded = run_lengths().decode(list(codes))  # (h, w, n), objects slowest in memory
    return torch.from_numpy(decoded.transpose(2, 0, 1)).contiguous()
