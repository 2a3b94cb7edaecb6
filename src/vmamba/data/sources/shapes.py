"""Built-in images of shapes, drawn from a seed: a first try of detection and segmentation without data.

Letters in shapes: h height, w width.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, field_validator

from vmamba.config import Section
from vmamba.data.annotated import AnnotatedImages
from vmamba.data.decoding import RGB, DecodedImage, Decoding
from vmamba.data.objects import Objects, encoded_masks
from vmamba.data.section import DetectionSection, SegmentationSection, Split
from vmamba.data.seeding import draw_seed
from vmamba.data.segmented import SegmentedImages

KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
"""The classes of objects. In segmentation, 0 is the background and they follow."""

MOST_SHAPES = 6
GRID = 16
"""Corners lie on a grid of 1/16 pixel, in whole numbers: every machine fills the same pixels."""
LEAST_VISIBLE = 0.5
"""A shape that would leave less of an earlier one to be seen is not drawn."""

Corners: TypeAlias = list[tuple[float, float]]


@dataclass(frozen=True)
class Drawing:
    """An image of shapes.

    Attributes:
        pixels: (h, w, 3) uint8.
        owner: (h, w) int64, the number of the shape that is seen at each pixel, from 1; 0 for background.
        kinds: The index in `KINDS` of each shape.
    """

    pixels: NDArray[np.uint8]
    owner: NDArray[np.int64]
    kinds: list[int]


@dataclass(frozen=True)
class Shapes:
    """Which images there are.

    Attributes:
        split: "train" or "val".
        length: The number of images.
        sides: The shorter and the longer side, in pixels.
        seed: Of all that is drawn.
    """

    split: str
    length: int
    sides: tuple[int, int]
    seed: int

    def __str__(self) -> str:
        return f"shapes ({self.split})"

    def name(self, index: int) -> str:
        """An image's name for messages."""
        return f"shapes/{self.key(index)}"

    def key(self, index: int) -> str:
        """An image's name."""
        return f"{self.split}/{index}"

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of an image."""
        return _size(self._random(index), self.sides)

    def draw(self, index: int) -> Drawing:
        """Draw an image: a function of (seed, split, index) alone."""
        random = self._random(index)
        height, width = _size(random, self.sides)
        pixels = _background(random, height, width)
        owner = np.zeros((height, width), dtype=np.int64)
        kinds: list[int] = []
        areas: list[int] = []
        for _ in range(random.randint(1, MOST_SHAPES + 1)):
            kind = random.randint(len(KINDS))
            filled = _fill(random, KINDS[kind], height, width, self.sides[0])
            colour = _vivid_colour(random)
            if not _may_cover(owner, filled, areas):
                continue
            kinds.append(kind)
            areas.append(int(filled.sum()))
            owner[filled] = len(kinds)
            pixels[filled] = colour
        noise = random.randint(-12, 13, (height, width, 3))
        return Drawing(np.clip(pixels + noise, 0, 255).astype(np.uint8), owner, kinds)

    def _random(self, index: int) -> np.random.RandomState:
        # Of NumPy's generators the one whose numbers never change between versions.
        seed = draw_seed("shapes", self.seed, ("train", "val").index(self.split), index)
        return np.random.RandomState(seed % 2**32)


def _size(random: np.random.RandomState, sides: tuple[int, int]) -> tuple[int, int]:
    """Height and width: the first draw of an image says which way it lies."""
    short, long = sides
    return (short, long) if random.randint(2) else (long, short)


def _background(random: np.random.RandomState, height: int, width: int) -> NDArray[np.int64]:
    """Soft clouds of gray, (h, w, 3), in whole numbers."""
    corners = random.randint(-50, 51, (4, 5))
    clouds = _weights(height, 4) @ corners @ _weights(width, 5).T // GRID**2
    return np.repeat((random.randint(60, 196) + clouds)[:, :, None], 3, axis=2)


@lru_cache
def _weights(length: int, knots: int) -> NDArray[np.int64]:
    """Linear interpolation between knots as weights (length, knots) that add up to `GRID`."""
    position = np.arange(length) * (knots - 1) * GRID // length
    weights = np.zeros((length, knots), dtype=np.int64)
    first, rest = position // GRID, position % GRID
    weights[np.arange(length), first] = GRID - rest
    weights[np.arange(length), first + 1] = rest
    return weights


def _vivid_colour(random: np.random.RandomState) -> NDArray[np.int64]:
    """A colour that no gray comes near: a small network soon tells shapes from the background."""
    while True:
        colour = random.randint(0, 256, 3)
        if colour.max() - colour.min() >= 120:
            return colour


def _may_cover(owner: NDArray[np.int64], filled: NDArray[np.bool_], areas: list[int]) -> bool:
    """Whether enough of every earlier shape stays to be seen.

    Args:
        owner: Of `Drawing`, so far.
        filled: The new shape.
        areas: The pixels of each earlier shape, hidden ones too.
    """
    visible = np.bincount(owner[~filled], minlength=len(areas) + 1)[1:]
    return bool((visible >= LEAST_VISIBLE * np.array(areas)).all())


def _fill(random: np.random.RandomState, kind: str, height: int, width: int, side: int) -> NDArray[np.bool_]:
    """The pixels of a shape of random size, place and rotation, (h, w)."""
    radius = random.uniform(0.1, 0.28) * side
    y, x = random.uniform(0, height), random.uniform(0, width)
    angle = random.uniform(0, 2 * math.pi)
    y, x = (min(max(c, radius * 0.8), end - radius * 0.8) for c, end in ((y, height), (x, width)))
    rows = np.arange(height)[:, None] * GRID + GRID // 2 - round(y * GRID)
    columns = np.arange(width) * GRID + GRID // 2 - round(x * GRID)
    if kind in ("circle", "ring"):
        squared, outer = rows**2 + columns**2, round(radius * GRID)
        disc = squared <= outer**2
        return disc & (squared > (outer // 2) ** 2) if kind == "ring" else disc
    corners = [
        (
            round(GRID * radius * (u * math.cos(angle) - v * math.sin(angle))),
            round(GRID * radius * (u * math.sin(angle) + v * math.cos(angle))),
        )
        for u, v in _CORNERS[kind]
    ]
    return _inside(corners, rows, columns)


def _regular(number: int, radii: tuple[float, ...] = (1.0,)) -> Corners:
    """Corners at equal angles around the centre, with distances in turn."""
    angles = [2 * math.pi * i / number for i in range(number)]
    return [
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


_CORNERS: dict[str, Corners] = {
    "square": _regular(4),
    "triangle": _regular(3),
    "star": _regular(10, (1.0, 0.42)),
    "cross": [
        (sign_u * u, sign_v * v)
        for sign_u, sign_v, steps in (
            (1, 1, ((0.95, 0.32), (0.32, 0.32), (0.32, 0.95))),
            (-1, 1, ((0.32, 0.95), (0.32, 0.32), (0.95, 0.32))),
            (-1, -1, ((0.95, 0.32), (0.32, 0.32), (0.32, 0.95))),
            (1, -1, ((0.32, 0.95), (0.32, 0.32), (0.95, 0.32))),
        )
        for u, v in steps
    ],
}
"""Corners of the shapes at radius 1, one after another around the outline."""


def _inside(
    corners: list[tuple[int, int]], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The points inside of a polygon by the even-odd rule, (h, w).

    Args:
        corners: (x, y).
        rows: (h, 1), the points' y.
        columns: (w,), the points' x.
    """
    inside = np.zeros((len(rows), len(columns)), dtype=bool)
    for (x1, y1), (x2, y2) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y1 == y2:
            continue
        if y1 > y2:
            x1, y1, x2, y2 = x2, y2, x1, y1
        crosses = (rows >= y1) & (rows < y2)
        inside ^= crosses & ((columns - x1) * (y2 - y1) < (x2 - x1) * (rows - y1))
    return inside


def _png(drawing: Drawing) -> BytesIO:
    file = BytesIO()
    Image.fromarray(drawing.pixels).save(file, "png")
    file.seek(0)
    return file


class DetectionShapes(AnnotatedImages):
    """Images of shapes with boxes and masks; later shapes hide earlier ones in them as in the image.

    Args:
        shapes: Which images.
        decoding: The format to decode to.
    """

    def __init__(self, shapes: Shapes, decoding: Decoding = RGB) -> None:
        self.shapes, self.decoding = shapes, decoding
        self.classes, self.category_ids = list(KINDS), list(range(1, len(KINDS) + 1))

    def __str__(self) -> str:
        return str(self.shapes)

    def __len__(self) -> int:
        return self.shapes.length

    def open(self, index: int) -> BytesIO:
        return _png(self.shapes.draw(index))

    def name(self, index: int) -> str:
        return self.shapes.name(index)

    def key(self, index: int) -> str:
        return self.shapes.key(index)

    def size(self, index: int) -> tuple[int, int]:
        return self.shapes.size(index)

    def has_objects(self, index: int) -> bool:
        return True

    def class_counts(self) -> NDArray[np.int64]:
        kinds = [kind for index in range(len(self)) for kind in self.shapes.draw(index).kinds]
        return np.bincount(kinds, minlength=len(KINDS))

    def report_empty_classes(self) -> None:
        """Nothing: every kind is drawn, and counting them would draw all images."""

    def objects(self, index: int) -> Objects:
        return self._objects(index, self.shapes.draw(index))

    def load(self, index: int) -> tuple[DecodedImage, Objects]:
        drawing = self.shapes.draw(index)
        image = self.decoding.convert(Image.fromarray(drawing.pixels), self.name(index))
        return image, self.renumbered(self._objects(index, drawing))

    def _objects(self, index: int, drawing: Drawing) -> Objects:
        numbers = range(1, len(drawing.kinds) + 1)
        masks = [drawing.owner == number for number in numbers]
        height, width = drawing.owner.shape
        return Objects(
            image_id=index,
            size=(height, width),
            boxes=torch.tensor([_box(mask) for mask in masks], dtype=torch.float32),
            labels=torch.tensor(drawing.kinds),
            masks=encoded_masks(masks),
            areas=torch.tensor([mask.sum() for mask in masks], dtype=torch.float32),
            crowd=torch.zeros(len(masks), dtype=torch.bool),
            ids=[index * MOST_SHAPES + number for number in numbers],
        )


def _box(mask: NDArray[np.bool_]) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


class SegmentationShapes(SegmentedImages):
    """Images of shapes with the class of each pixel: "background", or the shape that is seen there.

    Args:
        shapes: Which images.
        decoding: The format to decode to.
    """

    def __init__(self, shapes: Shapes, decoding: Decoding = RGB) -> None:
        self.shapes, self.decoding = shapes, decoding
        self.classes = ["background", *KINDS]

    def __str__(self) -> str:
        return str(self.shapes)

    def __len__(self) -> int:
        return self.shapes.length

    def open(self, index: int) -> BytesIO:
        return _png(self.shapes.draw(index))

    def name(self, index: int) -> str:
        return self.shapes.name(index)

    def key(self, index: int) -> str:
        return self.shapes.key(index)

    def target(self, index: int) -> NDArray[np.uint8]:
        return _labels(self.shapes.draw(index))

    def load(self, index: int) -> tuple[DecodedImage, NDArray[np.uint8]]:
        drawing = self.shapes.draw(index)
        image = self.decoding.convert(Image.fromarray(drawing.pixels), self.name(index))
        return image, _labels(drawing)


def _labels(drawing: Drawing) -> NDArray[np.uint8]:
    return np.array([0, *(kind + 1 for kind in drawing.kinds)], dtype=np.uint8)[drawing.owner]


class _ShapesKeys(Section):
    """The keys of the built-in images, whatever is learnt from them."""

    train_images: int = Field(default=800, ge=1)
    val_images: int = Field(default=100, ge=1)
    sides: tuple[int, int] = Field(
        default=(128, 160),
        strict=False,
        description="of the images, in pixels: the shorter and the longer one",
    )
    seed: int = Field(default=0, ge=0, description="of what is drawn")

    @field_validator("sides")
    @classmethod
    def _in_order(cls, sides: tuple[int, int]) -> tuple[int, int]:
        if not 32 <= sides[0] <= sides[1]:
            raise ValueError(
                f"expected the shorter side, of at least 32 pixels, and the longer one, got {sides}"
            )
        return sides

    def shapes(self, split: Split) -> Shapes:
        """The images of a split."""
        return Shapes(
            split, self.train_images if split == "train" else self.val_images, self.sides, self.seed
        )


class ShapesDetectionSection(_ShapesKeys, DetectionSection):
    """Built in: images of shapes with boxes and masks, drawn from a seed."""

    source: Literal["shapes"] = "shapes"

    def open(self, split: Split, decoding: Decoding = RGB) -> DetectionShapes:
        return DetectionShapes(self.shapes(split), decoding)


class ShapesSegmentationSection(_ShapesKeys, SegmentationSection):
    """Built in: images of shapes with the class of each pixel, drawn from a seed."""

    source: Literal["shapes"] = "shapes"

    def open(self, split: Split, decoding: Decoding = RGB) -> SegmentationShapes:
        return SegmentationShapes(self.shapes(split), decoding)
