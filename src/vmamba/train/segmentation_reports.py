"""What an evaluation of a segmenter writes: tables, the confusion of classes, the worst images."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vmamba.data.decoding import DecodedImage
from vmamba.data.overlay import draw_segmentation
from vmamba.errors import DataError
from vmamba.train.confusion import draw_confusion, score_cell, write_csv
from vmamba.train.segmentation_metrics import COLUMNS, class_scores, count_pixels
from vmamba.train.task import SamplePrediction
from vmamba.train.worst import SHOWN, SIDE, Pair, draw_pairs


class JudgedSegmentation(NamedTuple):
    """What was predicted for an image, and how it was judged.

    Attributes:
        miou: Mean IoU of the classes that are true or predicted in the image; NaN if no pixel counts.
        png: The predicted classes as a PNG file, in which they take little memory.
    """

    miou: float
    png: bytes

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The predicted classes, (h, w)."""
        return np.asarray(Image.open(io.BytesIO(self.png)))


def judge_segmentation(predicted: Tensor, labels: Tensor, num_classes: int) -> JudgedSegmentation:
    """Judge an image by itself.

    Args:
        predicted: Classes (h, w), integers.
        labels: The true ones (h, w), integers; pixels of 255 do not count.
        num_classes: k.
    """
    scores = class_scores(count_pixels(predicted, labels, num_classes))
    file = io.BytesIO()
    Image.fromarray(predicted.byte().cpu().numpy()).save(file, "PNG", compress_level=1)
    return JudgedSegmentation(scores[:, 0].nanmean().item(), file.getvalue())


def write_segmentation_report(results: Mapping[str, Tensor], classes: Sequence[str], folder: Path) -> None:
    """Write iou.csv, confusion.csv and confusion.png.

    Args:
        results: Of `IoUMetric` with tables.
        classes: Names.
        folder: To write into.

    Raises:
        OSError: A file cannot be written.
    """
    confusion = results["confusion"][: len(classes), : len(classes)]
    pixels = confusion.sum(1).tolist()
    total = [results[name].item() for name in ("mIoU", "mAcc")]
    rows: list[list[Any]] = [["all classes", sum(pixels), *map(score_cell, total)]]
    for name, number, values in zip(classes, pixels, results["per_class"].tolist(), strict=True):
        rows.append([name, number, *map(score_cell, values)])
    write_csv(folder / "iou.csv", ["class", "pixels", *COLUMNS], rows)
    counts = [[name, *row] for name, row in zip(classes, confusion.tolist(), strict=True)]
    write_csv(folder / "confusion.csv", ["true class", *classes], counts)
    draw_confusion(confusion, classes, folder / "confusion.png", counts="pixels")


def draw_worst_segmentations(
    predictions: Sequence[SamplePrediction],
    classes: Sequence[str],
    read: Callable[[int], tuple[DecodedImage, NDArray[np.uint8]]],
    path: Path,
) -> None:
    """Draw the images with the lowest mean IoU: truth beside prediction.

    Args:
        predictions: With values of `JudgedSegmentation`.
        classes: Names.
        read: An image and its true classes by index; they are read again, so that none are held in memory.
        path: Of the PNG.
    """
    wrong = [each for each in predictions if each.value.miou < 1]  # not NaN
    pairs = []
    for each in sorted(wrong, key=lambda each: each.value.miou)[:SHOWN]:
        judged: JudgedSegmentation = each.value
        try:
            image, labels = read(each.index)
        except DataError:  # it could be read before
            continue
        truth, prediction = (
            draw_segmentation(image, values, classes, side=SIDE) for values in (labels, judged.labels)
        )
        pairs.append(Pair(each.name, f"mIoU {judged.miou:.2f}", truth, prediction))
    draw_pairs(pairs, path)
