"""What an evaluation of a detector writes: tables, curves, the confusion of classes, the worst images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vmamba.data.decoding import DecodedImage
from vmamba.data.objects import Objects
from vmamba.data.overlay import colour, draw_objects
from vmamba.errors import DataError
from vmamba.files import save_figure
from vmamba.train.confusion import draw_confusion, score_cell, shortened, without_missing_glyphs, write_csv
from vmamba.train.detection_matches import (
    MATCH_IOU,
    MATCH_SCORE,
    match,
    regions_of_detections,
    regions_of_objects,
)
from vmamba.train.detection_metrics import IOUS, KINDS, RECALLS, SCORES
from vmamba.train.task import SamplePrediction
from vmamba.train.worst import SHOWN, SIDE, Pair, draw_pairs

BACKGROUND = "background"
"""In the confusion the true class of detections without an object and the predicted one of missed objects."""


NAMED = 8
"""Most classes whose curves are named in the picture."""

TITLES = {"box": "boxes", "mask": "masks"}


class JudgedDetections(NamedTuple):
    """What was detected in an image with a score of at least 0.3, and how it was judged.

    Attributes:
        right: Detections with an object of their class.
        wrong: Detections without one, and objects without a detection of their class.
        boxes: (n, 4), x1 y1 x2 y2.
        labels: (n,), from 0.
        scores: (n,).
        masks: n run-length codes.
    """

    right: int
    wrong: int
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: list[dict[str, Any]]

    @property
    def f1(self) -> float:
        """The harmonic mean of precision and recall; 1 for an image without objects and detections."""
        return 2 * self.right / (2 * self.right + self.wrong) if self.right + self.wrong else 1.0


def judge_detections(detections: Mapping[str, Any], objects: Objects, num_classes: int) -> JudgedDetections:
    """Judge an image by itself, by the rule of `vmamba.train.detection_matches`.

    Args:
        detections: See `CocoMetric.update`.
        objects: The annotated ones.
        num_classes: k.
    """
    regions, annotated = (
        regions_of_detections(detections, objects.size, num_classes),
        regions_of_objects(objects),
    )
    matches = match(regions, annotated)
    right = sum(regions.labels[d] == annotated.labels[o] for d, o in matches.pairs)
    kept = np.flatnonzero(regions.scores >= MATCH_SCORE)
    boxes = torch.from_numpy(regions.boxes[kept])
    return JudgedDetections(
        right=int(right),
        wrong=len(matches.false) + len(matches.missed) + 2 * (len(matches.pairs) - int(right)),
        boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
        labels=torch.from_numpy(regions.labels[kept]),
        scores=torch.from_numpy(regions.scores[kept]),
        masks=[regions.masks[number] for number in kept],
    )


def write_detection_report(results: Mapping[str, Tensor], classes: Sequence[str], folder: Path) -> None:
    """Write ap.csv, precision_recall.csv and .png, confusion.csv and .png.

    Args:
        results: Of `CocoMetric` with tables.
        classes: Names.
        folder: To write into.

    Raises:
        OSError: A file cannot be written.
    """
    _write_ap(results, classes, folder / "ap.csv")
    _write_curves(results, classes, folder / "precision_recall.csv")
    _draw_curves(results, classes, folder / "precision_recall.png")
    names, confusion = [*classes, BACKGROUND], results["confusion"]
    counts = [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)]
    write_csv(folder / "confusion.csv", ["true class", *names], counts)
    draw_confusion(
        confusion,
        names,
        folder / "confusion.png",
        "How the objects of each class are detected; the last is the background\n"
        f"(score ≥ {MATCH_SCORE}, IoU of boxes ≥ {MATCH_IOU})",
        counts="objects",
    )


def _write_ap(results: Mapping[str, Tensor], classes: Sequence[str], path: Path) -> None:
    """A row for each class, and one for all: its objects, and the scores of boxes and masks."""
    objects = results["confusion"].sum(1).tolist()
    columns = [f"{kind}_{name}" for kind in KINDS for name in SCORES]
    tables = torch.cat([results[f"{kind}_per_class"] for kind in KINDS], dim=1).tolist()
    total = [results[column].item() if column in results else float("nan") for column in columns]
    rows = [["all classes", sum(objects[:-1]), *map(score_cell, total)]]
    rows += [
        [name, number, *map(score_cell, values)]
        for name, number, values in zip(classes, objects[:-1], tables, strict=True)
    ]
    write_csv(path, ["class", "objects", *columns], rows)


def _write_curves(results: Mapping[str, Tensor], classes: Sequence[str], path: Path) -> None:
    """Precision at each recall, at IoUs of 0.5, of 0.75 and on average, of each class and their mean."""
    rows = []
    for kind in KINDS:
        precision = results[f"{kind}_precision"]
        for name, values in (
            ("0.50", precision[0]),
            ("0.75", precision[5]),
            ("0.50:0.95", precision.mean(0)),
        ):
            means = values.nanmean(1, keepdim=True)
            for recall, row in zip(RECALLS, torch.cat([means, values], dim=1).tolist(), strict=True):
                rows.append([kind, name, f"{recall:.2f}", *map(score_cell, row)])
    write_csv(path, ["kind", "IoU", "recall", "all classes", *classes], rows)


def _draw_curves(results: Mapping[str, Tensor], classes: Sequence[str], path: Path) -> None:
    """Left the mean of all classes at each IoU, right each class at IoU 0.5; boxes above, masks below."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    grid = figure.subplots(len(KINDS), 2, sharex=True, sharey=True)
    objects = results["confusion"].sum(1)[:-1]
    for kind, (left, right) in zip(KINDS, grid, strict=True):
        precision = results[f"{kind}_precision"]
        for number, iou in enumerate(IOUS):
            values = precision[number].nanmean(1)
            of = colormaps["viridis"](number / len(IOUS))
            left.plot(RECALLS, values, color=of, label=f"{iou:.2f} ({values.mean():.3f})")
        left.set(title=f"{TITLES[kind]}: mean of the classes", ylabel="precision")
        _draw_classes(right, precision[0], objects, classes)
        right.set_title(f"{TITLES[kind]}: classes at an IoU of 0.50")
        for axes, title in ((left, "IoU (AP)"), (right, "class (AP50)")):
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
            axes.grid(alpha=0.3)
            axes.legend(title=title, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    for axes in grid[-1]:
        axes.set_xlabel("recall")
    with without_missing_glyphs():
        save_figure(figure, path, dpi=120)


def _draw_classes(axes: Any, precision: Tensor, objects: Tensor, classes: Sequence[str]) -> None:
    """Precision (r, k) of each class and their mean; of many classes those with most objects are named."""
    scores = precision.mean(0)
    ranked = [number for number in objects.argsort(descending=True, stable=True).tolist() if objects[number]]
    for number in ranked[NAMED:]:
        label = f"{len(ranked) - NAMED} with fewer objects" if number == ranked[-1] else None
        axes.plot(RECALLS, precision[:, number], color="0.82", linewidth=0.7, label=label)
    for place, number in enumerate(ranked[:NAMED]):
        of = [value / 255 for value in colour(place)]
        label = f"{shortened(classes[number])} ({scores[number]:.3f})"
        axes.plot(RECALLS, precision[:, number], color=of, linewidth=1.5, label=label)
    mean = precision.nanmean(1)
    axes.plot(RECALLS, mean, color="black", linewidth=2, label=f"mean ({mean.mean():.3f})")


def draw_worst_detections(
    predictions: Sequence[SamplePrediction],
    classes: Sequence[str],
    read: Callable[[int], tuple[DecodedImage, Objects]],
    path: Path,
) -> None:
    """Draw the images with the lowest F1, of equal ones those with most mistakes: truth beside prediction.

    Crowd regions are left out, and so are detections with a score below 0.3.

    Args:
        predictions: With values of `JudgedDetections`.
        classes: Names.
        read: An image and its objects by index; they are read again, so that none are held in memory.
        path: Of the PNG.
    """
    wrong = [each for each in predictions if each.value.wrong]
    worst = sorted(wrong, key=lambda each: (each.value.f1, -each.value.wrong))
    pairs = []
    for each in worst[:SHOWN]:
        judged: JudgedDetections = each.value
        try:
            image, objects = read(each.index)
        except DataError:  # it could be read before
            continue
        objects = objects.select(~objects.crowd)
        truth = draw_objects(image, objects.boxes, objects.labels, None, objects.masks, classes, side=SIDE)
        prediction = draw_objects(
            image, judged.boxes, judged.labels, judged.scores, judged.masks, classes, side=SIDE
        )
        pairs.append(Pair(each.name, f"F1 {judged.f1:.2f}", truth, prediction))
    draw_pairs(pairs, path)
