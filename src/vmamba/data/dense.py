"""Datasets for detection and segmentation: what training changes in the images, and how samples are batched.

Letters in shapes: n objects, c channels, h height, w width.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Self

from vmamba.config import Section
from vmamba.data.annotated import AnnotatedImages
from vmamba.data.dataset import ImageDataset
from vmamba.data.decoding import DecodedImage, as_floats
from vmamba.data.objects import Objects, decoded_masks
from vmamba.data.preprocessing import Preprocessing
from vmamba.data.sampling import SampleKey
from vmamba.data.segmented import SegmentedImages
from vmamba.errors import DataError
from vmamba.labels import IGNORED
from vmamba.sizes import scaled_size
from vmamba.words import counted

log = logging.getLogger(__name__)

SMALLEST_SIDE = 32
"""Images with a shorter side, in pixels, are left out of detection's training, as mmdet does."""


class DetectionAugment(Section):
    """What training changes in images with objects; the defaults are the paper's 1× schedule."""

    hflip: float = Field(default=0.5, ge=0, le=1)
    short_sides: list[int] = Field(
        default=[800], min_length=1, description="of the resized image, in pixels, of which one is drawn"
    )
    long_side: int = Field(default=1333, ge=1, description="at most")
    crop_probability: float = Field(
        default=0.0, ge=0, le=1, description="of resizing to one of crop_short_sides and cropping first"
    )
    crop_short_sides: list[int] = Field(default=[400, 500, 600], min_length=1)
    crop_size: tuple[int, int] = Field(
        default=(384, 600), strict=False, description="smallest and largest side of the crop, in pixels"
    )

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        for name in ("short_sides", "crop_short_sides", "crop_size"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1 pixel, got {getattr(self, name)}")
        if self.crop_size[0] > self.crop_size[1]:
            raise ValueError(f"crop_size {self.crop_size}: the first is above the second")
        return self


class SegmentationAugment(Section):
    """What training changes in images with a class for each pixel; the defaults are the paper's."""

    hflip: float = Field(default=0.5, ge=0, le=1)
    base_size: tuple[int, int] = Field(
        default=(512, 2048),
        strict=False,
        description="short and long side that the image is fitted into, keeping its ratio, before scale",
    )
    scale: tuple[float, float] = Field(
        default=(0.5, 2.0), strict=False, description="range of the factor of base_size"
    )
    crop: int = Field(default=512, ge=8, description="side of the crop, in pixels")
    cat_max_ratio: float = Field(
        default=0.75,
        gt=0,
        le=1,
        description="draw the crop again, up to ten times, if one class has more of its pixels",
    )
    photometric: bool = Field(default=True, description="change brightness, contrast, saturation and hue")

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        if not 1 <= self.base_size[0] <= self.base_size[1]:
            raise ValueError(f"base_size {self.base_size}: expected the short side and then the long one")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale}: expected two factors above 0, the smaller one first")
        return self


class DetectionDataset(ImageDataset[Objects]):
    """Images with objects.

    A training sample is `{"image", "target"}`: float32 (c, h, w) from 0 to 1, and the objects but for
    crowds, `{"boxes" (n, 4), "labels" (n,) from 1, "masks" (n, h, w) uint8, "image_id" ()}`. One for
    evaluation is `{"image", "objects"}`, both at the size of the image.

    Args:
        source: Where the images come from.
        seed: Of the augmentation.
        augment: What training changes; None for evaluation.
        limit: How many images to take, the first of those that are not left out; None for all.

    Attributes:
        kept: The index in the source of each sample. Training leaves out images that are small or without
            objects.
        shapes_alike: For training, whether each sample is landscape; see `sampler_for`.

    Raises:
        DataError: Training would leave out every image.
    """

    source: AnnotatedImages
    shapes_alike: NDArray[np.bool_] | None = None

    def __init__(
        self,
        source: AnnotatedImages,
        seed: int = 0,
        augment: DetectionAugment | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(source, seed)
        self.settings = augment
        self.kept: NDArray[np.int64] = np.arange(len(source))
        if augment is not None:
            self.kept = _trainable(source)
        self.kept = self.kept[:limit]
        if augment is not None:
            sizes = [source.size(index) for index in self.kept.tolist()]
            self.shapes_alike = np.array([width >= height for height, width in sizes])

    def __len__(self) -> int:
        return len(self.kept)

    def name(self, index: int) -> str:
        return self.source.name(int(self.kept[index]))

    def __getitem__(self, key: SampleKey) -> Any:
        key = SampleKey(*key)
        return super().__getitem__(key._replace(index=int(self.kept[key.index])))

    def augment(self, image: DecodedImage, target: Objects) -> dict[str, Any]:
        pixels = as_floats(image)
        if self.settings is None:
            return {"image": pixels, "objects": target}
        boxes = _clipped(target.boxes, target.size)  # annotated ones may reach over the border
        chosen = ~target.crowd & _at_least_a_pixel(boxes) & (target.areas > 0)
        objects = replace(target, boxes=boxes).select(chosen)
        changes = _draw_changes(_size(pixels), self.settings)
        return {
            "image": changes.of_image(pixels),
            "target": {**_changed_objects(objects, changes), "image_id": torch.tensor(target.image_id)},
        }


class SegmentationDataset(ImageDataset[NDArray[np.uint8]]):
    """Images with a class for each pixel.

    A training sample is `{"image", "labels"}`: normed float32 (c, crop, crop), and int64 (crop, crop), padded
    right and below with 0 and `IGNORED`. One for evaluation has both at the file's size, labels as uint8.

    Args:
        source: Where the images come from.
        preprocessing: Its mean and deviation.
        seed: Of the augmentation.
        augment: What training changes; None for evaluation.
        limit: How many of the source's first images to take; None for all.
    """

    source: SegmentedImages

    def __init__(
        self,
        source: SegmentedImages,
        preprocessing: Preprocessing,
        seed: int = 0,
        augment: SegmentationAugment | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(source, seed)
        self.settings, self.limit = augment, limit
        self.mean = torch.tensor(preprocessing.mean)[:, None, None]
        self.std = torch.tensor(preprocessing.std)[:, None, None]

    def __len__(self) -> int:
        return len(self.source) if self.limit is None else min(self.limit, len(self.source))

    def augment(self, image: DecodedImage, target: NDArray[np.uint8]) -> dict[str, Tensor]:
        pixels, labels = as_floats(image), torch.from_numpy(np.ascontiguousarray(target))
        if self.settings is None:
            return {"image": (pixels - self.mean) / self.std, "labels": labels}
        pixels, labels = _augment_labels(pixels, labels, self.settings)
        height, width = _size(pixels)
        padding = (0, self.settings.crop - width, 0, self.settings.crop - height)
        return {
            "image": F.pad((pixels - self.mean) / self.std, padding),
            "labels": F.pad(labels.long(), padding, value=IGNORED),
        }


def collate_dense(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of samples of `DetectionDataset` or `SegmentationDataset`.

    Returns:
        Lists "images" and "targets", "objects" or "labels". Of segmentation's training samples, which are of
        one size, tensors (b, …) instead.
    """
    batch: dict[str, Any] = {"images": [sample["image"] for sample in samples]}
    for key, name in (("target", "targets"), ("objects", "objects"), ("labels", "labels")):
        if key in samples[0]:
            batch[name] = [sample[key] for sample in samples]
    if "labels" in batch and batch["labels"][0].dtype == torch.int64:
        return {name: torch.stack(values) for name, values in batch.items()}
    return batch


def _trainable(source: AnnotatedImages) -> NDArray[np.int64]:
    """The images with objects and of sides that are not too small."""
    with_objects = np.array([source.has_objects(index) for index in range(len(source))], dtype=bool)
    large = np.array([min(source.size(index)) >= SMALLEST_SIDE for index in range(len(source))], dtype=bool)
    kept = np.flatnonzero(with_objects & large)
    if len(kept) < len(source):
        log.warning(
            "%s: training leaves out %s without objects and %s with a side under %d pixels",
            source,
            counted(int((~with_objects).sum()), "image"),
            counted(int((with_objects & ~large).sum()), "more", "more"),
            SMALLEST_SIDE,
        )
    if not len(kept):
        raise DataError(
            f"{source}: no image to train on: expected one with objects that are no crowd, and sides of at "
            f"least {SMALLEST_SIDE} pixels"
        )
    return kept


def _size(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[-2], pixels.shape[-1]


def _resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (c, h, w) resized bilinearly, without antialiasing."""
    if _size(pixels) == size:
        return pixels
    return F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]


def _resized_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (n, h, w) uint8, n > 0, resized to the nearest pixel."""
    return masks if _size(masks) == size else F.interpolate(masks[None], size)[0]


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) clipped to an image's height and width; those outside become empty."""
    height, width = size
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def _at_least_a_pixel(boxes: Tensor) -> Tensor:
    """Which boxes are at least a pixel wide and high, (n,) bool."""
    return (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)


@dataclass(frozen=True)
class _Changes:
    """What training changes in an image with objects, in this order.

    Attributes:
        size: Height and width of the image before.
        flip: Mirror it left to right.
        crop: The size to resize to first, and the window of it: top, left, height and width; or None.
        resized: The size in the end.
    """

    size: tuple[int, int]
    flip: bool
    crop: tuple[tuple[int, int], tuple[int, int, int, int]] | None
    resized: tuple[int, int]

    def of_image(self, pixels: Tensor) -> Tensor:
        """An image (c, h, w)."""
        return self._of_pixels(pixels, _resized)

    def of_mask(self, mask: Tensor) -> Tensor:
        """A mask (1, h, w)."""
        return self._of_pixels(mask, _resized_masks)

    def _of_pixels(self, pixels: Tensor, resize: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
        if self.flip:
            pixels = pixels.flip(-1)
        if self.crop is not None:
            size, (top, left, height, width) = self.crop
            pixels = resize(pixels, size)[..., top : top + height, left : left + width]
        return resize(pixels, self.resized)

    def of_boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) inside the image; those outside of a crop become empty."""
        size = self.size
        if self.flip:
            left, top, right, bottom = boxes.unbind(1)
            boxes = torch.stack([size[1] - right, top, size[1] - left, bottom], 1)
        if self.crop is not None:
            resized, window = self.crop
            corner = torch.tensor([window[1], window[0]] * 2)
            boxes = _scaled_boxes(boxes, size, resized) - corner
            size = window[2:]
            boxes = _clipped(boxes, size)
        return _scaled_boxes(boxes, size, self.resized)


def _scaled_boxes(boxes: Tensor, size: tuple[int, int], resized: tuple[int, int]) -> Tensor:
    return boxes * torch.tensor([resized[1] / size[1], resized[0] / size[0]] * 2)


def _draw_changes(size: tuple[int, int], settings: DetectionAugment) -> _Changes:
    """Flip, perhaps crop, and resize an image of this height and width."""
    flip, crop, before = random.random() < settings.hflip, None, size
    if random.random() < settings.crop_probability:
        resized = scaled_size(size, random.choice(settings.crop_short_sides), settings.long_side)
        height, width = (
            random.randint(min(side, settings.crop_size[0]), min(side, settings.crop_size[1]))
            for side in resized
        )
        top, left = random.randint(0, resized[0] - height), random.randint(0, resized[1] - width)
        crop, before = (resized, (top, left, height, width)), (height, width)
    return _Changes(
        size, flip, crop, scaled_size(before, random.choice(settings.short_sides), settings.long_side)
    )


def _changed_objects(objects: Objects, changes: _Changes) -> dict[str, Tensor]:
    """The objects that are still visible: "boxes" (n, 4), "labels" (n,) from 1 and "masks" (n, h, w).

    A crop may leave none, as the paper's configuration has it (mmdet's allow_negative_crop). Masks are
    decoded and resized one at a time: at the size of the file, those of a crowded photo would take a
    gigabyte.
    """
    boxes = changes.of_boxes(objects.boxes)
    visible = _at_least_a_pixel(boxes)
    masks = []
    for number in visible.nonzero().flatten().tolist():
        mask = changes.of_mask(decoded_masks([objects.masks[number]], objects.size))
        visible[number] = mask.any()
        if visible[number]:
            masks.append(mask)
    return {
        "boxes": boxes[visible],
        "labels": objects.labels[visible] + 1,
        "masks": torch.cat(masks) if masks else torch.zeros(0, *changes.resized, dtype=torch.uint8),
    }


def _augment_labels(pixels: Tensor, labels: Tensor, settings: SegmentationAugment) -> tuple[Tensor, Tensor]:
    """Resize by a random factor, crop, flip, and change the colours."""
    factor = random.uniform(*settings.scale)
    short, long = (int(side * factor) for side in settings.base_size)
    size = scaled_size(_size(pixels), max(short, 1), max(long, 1))
    pixels, labels = _resized(pixels, size), _resized_masks(labels[None], size)[0]
    window = _balanced_crop(labels, settings)
    pixels, labels = pixels[:, window[0], window[1]], labels[window]
    if random.random() < settings.hflip:
        pixels, labels = pixels.flip(-1), labels.flip(-1)
    return (distort_colours(pixels) if settings.photometric else pixels), labels


def _balanced_crop(labels: Tensor, settings: SegmentationAugment) -> tuple[slice, slice]:
    """A crop with several classes of which none has too many pixels; after ten tries, any.

    Args:
        labels: (h, w).
        settings: Its side and the share of a class.
    """
    for _ in range(11):
        top, left = (random.randint(0, max(side - settings.crop, 0)) for side in labels.shape)
        window = slice(top, top + settings.crop), slice(left, left + settings.crop)
        counts = torch.bincount(labels[window].flatten(), minlength=IGNORED + 1)[:IGNORED]
        several = int((counts > 0).sum()) > 1
        if several and int(counts.max()) < settings.cat_max_ratio * int(counts.sum()):
            break
        if settings.cat_max_ratio >= 1:
            break
    return window


def distort_colours(pixels: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue, each in half of the images.

    The contrast is changed before saturation and hue, or after them. Saturation and hue are those of HSV,
    which only images of three channels have.

    Args:
        pixels: (c, h, w) from 0 to 1.
    """
    contrast_first = random.random() < 0.5
    if random.random() < 0.5:
        pixels = (pixels + random.uniform(-32, 32) / 255).clamp(0, 1)
    factor = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    if contrast_first:
        pixels = (pixels * factor).clamp(0, 1)
    if len(pixels) == 3:
        saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
        turn = random.uniform(-0.1, 0.1) if random.random() < 0.5 else 0.0
        if saturation != 1 or turn:
            pixels = _recoloured(pixels, saturation, turn)
    return pixels if contrast_first else (pixels * factor).clamp(0, 1)


def _recoloured(pixels: Tensor, saturation: float, turn: float) -> Tensor:
    """Change saturation and hue in HSV; several times as fast as torchvision's `adjust_hue`.

    Args:
        pixels: RGB, (3, h, w).
        saturation: Its factor; the product is at most 1.
        turn: Added to the hue, of which 1 is the whole circle.
    """
    red, green, blue = pixels
    value = pixels.amax(0)
    chroma = value - pixels.amin(0)  # saturation times value
    nonzero = chroma.clamp(min=1e-12)  # the hue of gray is of no consequence
    hue = torch.where(value == green, 2 + (blue - red) / nonzero, 4 + (red - green) / nonzero)
    hue = torch.where(value == red, (green - blue) / nonzero, hue)  # in sixths of the circle
    distance = (hue + 6 * turn + torch.tensor([5.0, 3.0, 1.0])[:, None, None]) % 6
    chroma = (chroma * saturation).minimum(value)
    return value - chroma * distance.minimum(4 - distance).clamp(0, 1)
