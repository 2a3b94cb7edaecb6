"""COCO's average precision of boxes and masks.

k classes; t = 10 IoUs from 0.5 to 0.95; r = 101 recalls from 0 to 1.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vmamba.data.objects import Objects
from vmamba.errors import DataError
from vmamba.train.detection_matches import Regions, confusion_of, regions_of_detections, regions_of_objects
from vmamba.train.means import gather

KINDS = ("box", "mask")
SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")
"""Of boxes and of masks; also the columns of the table `…_per_class`."""
IOUS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))
RECALLS = tuple(step / 100 for step in range(101))

MOST_DETECTIONS = 100
"""Detections of an image and class that count, those with the highest scores."""


class CocoMetric(nn.Module):
    """Average precision and recall as COCO computes them.

    They are computed by faster-coco-eval where it is installed, else by pycocotools, which gives the same.
    An image that comes several times counts once. The truth is what the annotation file says, boxes over the
    border of an image included, but for the annotations that `vmamba.data.coco_format.read_instances` leaves
    out: those with an empty or inverted box, or without an outline that has an area.

    Args:
        classes: Names.
        tables: Also give results by class, precision over recall, and the confusion of classes.
    """

    def __init__(self, classes: Sequence[str], tables: bool = False) -> None:
        super().__init__()
        self.classes, self.tables = list(classes), tables
        self._images: dict[int, tuple[Regions, Regions]] = {}

    def update(self, detections: Sequence[Mapping[str, Any]], objects: Sequence[Objects]) -> None:
        """Add images.

        Args:
            detections: As a `MaskRCNN` in evaluation mode gives them for each image, tensors boxes (n, 4),
                labels (n,) from 1 and scores (n,); but as masks n run-length codes, of
                `vmamba.dense_inference.mask_codes`.
            objects: The annotated ones of each image, crowd regions included.

        Raises:
            NonFiniteError: A box or score is NaN or infinite.
            ValueError: Detections do not fit the image or the classes.
        """
        for predicted, annotated in zip(detections, objects, strict=True):
            regions = regions_of_detections(predicted, annotated.size, len(self.classes))
            self._images[annotated.image_id] = regions, regions_of_objects(annotated)

    def compute(self) -> dict[str, Tensor]:
        """The results over all processes, each of which must call this.

        Returns:
            `box_AP` (mean over IoUs and classes), `box_AP50` and `box_AP75` (at one IoU), `box_AP_small`,
            `_medium` and `_large` (objects below 32² pixels, below 96², and larger), `box_AR100` (recall with
            at most 100 detections an image and class), and the same of masks. Scores of sizes that no object
            has are left out. With `tables` also `box_per_class` (k, 7), a column for each of `SCORES`;
            `box_precision` (t, r, k); the same of masks (NaN where a class has no such object); and
            `confusion` (k + 1, k + 1), see `vmamba.train.detection_matches`.

        Raises:
            DataError: The images have no objects but crowd regions.
        """
        images: dict[int, tuple[Regions, Regions]] = {}
        for of_process in gather(self._images):
            images |= of_process
        if all(objects.crowd.all() for _, objects in images.values()):
            raise no_objects(len(images))
        results: dict[str, Tensor] = {}
        for kind in KINDS:
            precision, recall = _evaluate(images, len(self.classes), kind)
            for name, value in _scores(precision, recall).items():
                if not np.isnan(value):
                    results[f"{kind}_{name}"] = torch.tensor(value, dtype=torch.float64)
            if self.tables:
                rows = [
                    list(_scores(precision[:, :, [number]], recall[:, [number]]).values())
                    for number in range(len(self.classes))
                ]
                results[f"{kind}_per_class"] = torch.tensor(rows, dtype=torch.float64)
                results[f"{kind}_precision"] = torch.from_numpy(_defined(precision[..., 0]))
        if self.tables:
            results["confusion"] = confusion_of(images.values(), len(self.classes))
        return results

    def reset(self) -> None:
        """Forget all images."""
        self._images = {}


def no_objects(images: int) -> DataError:
    """What is wrong with so many images of which none has an object."""
    return DataError(
        f"not one of the {images} evaluated images has an object that is no crowd region: average precision "
        "is not defined; check the annotations of the split val"
    )


def _evaluate(
    images: Mapping[int, tuple[Regions, Regions]], num_classes: int, kind: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (t, r, k, 4), recall (t, k, 4): of all, small, medium and large objects; −1 without any."""
    index_class, evaluation_class = _evaluator()
    coco = []
    for role in (1, 0):  # objects, detections
        index = index_class()
        index.dataset = {
            "images": [{"id": i, "height": a.size[0], "width": a.size[1]} for i, (_, a) in images.items()],
            "categories": [{"id": number} for number in range(num_classes)],
            "annotations": _annotations({i: pair[role] for i, pair in images.items()}, kind),
        }
        coco.append(index)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for index in coco:
            index.createIndex()
        evaluation = evaluation_class(*coco, iouType={"box": "bbox", "mask": "segm"}[kind])
        evaluation.params.maxDets = [MOST_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., 0], evaluation.eval["recall"][..., 0]


def _evaluator() -> tuple[Any, Any]:
    """The classes COCO and COCOeval of the fastest package that is installed."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return COCO, COCOeval
    return COCO, COCOeval_faster


def _annotations(images: Mapping[int, Regions], kind: str) -> list[dict[str, Any]]:
    """Regions in COCO's form."""
    annotations: list[dict[str, Any]] = []
    for image_id, regions in images.items():
        areas = regions.areas_of(kind)
        for number, label in enumerate(regions.labels):
            annotation = {
                "id": len(annotations) + 1,  # 0 would mean "not matched" in the evaluation
                "image_id": image_id,
                "category_id": int(label),
                "bbox": regions.boxes[number].tolist(),
                "area": float(areas[number]),
                "iscrowd": int(regions.crowd[number]),
                "score": float(regions.scores[number]),
            }
            if kind == "mask":
                annotation["segmentation"] = regions.masks[number]
            annotations.append(annotation)
    return annotations


def _scores(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """By the names of `SCORES`; NaN without objects of that size."""
    values = (precision[..., 0], precision[0, ..., 0], precision[5, ..., 0])
    by_size = (precision[..., size] for size in (1, 2, 3))
    return dict(zip(SCORES, map(_mean, (*values, *by_size, recall[..., 0])), strict=True))


def _mean(values: NDArray[np.float64]) -> float:
    """Over all but −1."""
    valid = values[values > -1]
    return float(np.mean(valid)) if valid.size else float("nan")


def _defined(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN for −1."""
    return np.where(values > -1, values, np.nan)
