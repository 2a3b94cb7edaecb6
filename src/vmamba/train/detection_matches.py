"""Which detection is which object: for the confusion of classes and for the images that went worst.

An object and a detection match where their boxes have an IoU of at least 0.5; detections with a score below
0.3 do not count. From the highest score down each detection is given the object of its class that it covers
best; only then are those left over given objects of other classes, which are confusions. Detections in a
crowd region of their class count neither as right nor as wrong.

k classes, n objects or detections.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmamba.data.objects import Objects, run_lengths
from vmamba.train.guard import NonFiniteError

MATCH_IOU = 0.5
"""Least IoU of the boxes of an object and its detection, and least share of a detection in a crowd region."""

MATCH_SCORE = 0.3
"""Least score of a detection that is matched."""


@dataclass(frozen=True)
class Regions:
    """Objects or detections of an image as metrics keep them: small, and fit to be sent to other processes.

    Attributes:
        size: Height and width of the image.
        boxes: (n, 4), left, top, width and height, float64.
        labels: (n,), from 0.
        masks: n run-length codes.
        scores: (n,), float64; 1 for objects.
        annotated_areas: (n,), float64; None for detections.
        crowd: (n,), bool.
    """

    size: tuple[int, int]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    masks: list[dict[str, Any]]
    scores: NDArray[np.float64]
    annotated_areas: NDArray[np.float64] | None
    crowd: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.labels)

    def areas_of(self, kind: str) -> NDArray[np.float64]:
        """The areas (n,) that say whether regions are small: of detections those of their "box" or "mask"."""
        if self.annotated_areas is not None:
            return self.annotated_areas
        if kind == "box":
            return self.boxes[:, 2] * self.boxes[:, 3]
        return np.array([float(run_lengths().area(mask)) for mask in self.masks])


def regions_of_objects(objects: Objects) -> Regions:
    """Annotated objects as regions."""
    return Regions(
        objects.size,
        _left_top_width_height(objects.boxes),
        objects.labels.cpu().numpy(),
        objects.masks,
        np.ones(len(objects.labels)),
        objects.areas.double().cpu().numpy(),
        objects.crowd.cpu().numpy(),
    )


def regions_of_detections(detections: Mapping[str, Any], size: tuple[int, int], num_classes: int) -> Regions:
    """What a `MaskRCNN` in evaluation mode gives for one image, as regions.

    Args:
        detections: Tensors boxes (n, 4), labels (n,) from 1 and scores (n,); and masks, n run-length codes.
        size: Height and width of the image.
        num_classes: k.

    Raises:
        NonFiniteError: A box or score is NaN or infinite.
        ValueError: The masks are of another size than the image, or a label is not in 1 … k.
    """
    boxes, labels, scores, masks = (detections[name] for name in ("boxes", "labels", "scores", "masks"))
    if not (boxes.isfinite().all() and scores.isfinite().all()):
        raise NonFiniteError("the model's outputs are not finite; judge it with train.precision=32-true")
    sizes = [tuple(mask["size"]) for mask in masks]
    if sizes != [tuple(size)] * len(labels):
        raise ValueError(
            f"detections['masks']: expected {len(labels)} of the image's size {tuple(size)}, got {sizes}"
        )
    if len(labels) and not (int(labels.min()) >= 1 and int(labels.max()) <= num_classes):
        raise ValueError(f"detections['labels']: expected 1 to {num_classes}, got {labels.tolist()}")
    return Regions(
        size,
        _left_top_width_height(boxes),
        labels.cpu().numpy() - 1,
        list(masks),
        scores.detach().double().cpu().numpy(),
        None,
        np.zeros(len(labels), bool),
    )


def _left_top_width_height(boxes: Tensor) -> NDArray[np.float64]:
    """Boxes with corners (n, 4) as COCO has them."""
    corners = boxes.detach().double().cpu().numpy().reshape(-1, 4)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


@dataclass(frozen=True)
class Matches:
    """How detections and objects of an image match, by their numbers.

    Attributes:
        pairs: (detection, object), also of different classes.
        false: Detections without an object.
        missed: Objects without a detection.
    """

    pairs: list[tuple[int, int]]
    false: list[int]
    missed: list[int]


def match(detections: Regions, objects: Regions) -> Matches:
    """Match the detections of an image with its objects, by the rule at the top of this file."""
    order = np.argsort(-detections.scores, kind="stable")
    order = order[detections.scores[order] >= MATCH_SCORE]
    overlaps = np.zeros((len(detections), len(objects)))
    if overlaps.size:
        overlaps = run_lengths().iou(detections.boxes, objects.boxes, objects.crowd.astype(np.uint8))
    overlaps = np.where(overlaps >= MATCH_IOU, overlaps, 0)
    same_class = detections.labels[:, None] == objects.labels[None]
    free = ~objects.crowd
    pairs: dict[int, int] = {}
    for allowed in (same_class, ~same_class):
        for detection in map(int, order):
            if detection in pairs:
                continue
            candidates = np.where(free & allowed[detection], overlaps[detection], 0)
            if candidates.any():
                pairs[detection] = int(candidates.argmax())
                free[pairs[detection]] = False
        in_crowd = (same_class & (overlaps > 0) & objects.crowd).any(1)
        order = order[~in_crowd[order]]
    false = [int(detection) for detection in order if detection not in pairs]
    return Matches(list(pairs.items()), false, np.flatnonzero(free).tolist())


def confusion_of(images: Iterable[tuple[Regions, Regions]], num_classes: int) -> Tensor:
    """Counts of true and detected classes over images.

    Args:
        images: The detections and the objects of each.
        num_classes: k.

    Returns:
        (k + 1, k + 1), int64: a row for each true class, a column for each detected one. The last row counts
        detections without an object, the last column objects without a detection.
    """
    counts = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
    for detections, objects in images:
        matches = match(detections, objects)
        for detection, single in matches.pairs:
            counts[objects.labels[single], detections.labels[detection]] += 1
        for detection in matches.false:
            counts[num_classes, detections.labels[detection]] += 1
        for single in matches.missed:
            counts[objects.labels[single], num_classes] += 1
    return counts
