"""Intersection over union of classes of pixels.

k classes, h height, w width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.errors import DataError
from vmamba.labels import IGNORED
from vmamba.train.means import gather

COLUMNS = ("IoU", "accuracy")
"""Of the table `per_class`."""


def count_pixels(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How often each class is predicted where each class is true.

    Args:
        predicted: Classes (h, w), integers below k.
        labels: The true ones (h, w), integers below k, or 255 where a pixel does not count.
        num_classes: k.

    Returns:
        (k, k), int64: a row for each true class.

    Raises:
        ValueError: The sizes differ, or there is a class that is not below k.
    """
    if predicted.shape != labels.shape:
        raise ValueError(
            f"predicted: expected the labels' size {tuple(labels.shape)}, got {tuple(predicted.shape)}"
        )
    labels = labels.to(predicted.device)
    counted = labels != IGNORED
    true, guessed = labels[counted].long(), predicted[counted].long()
    for name, values in (("labels", true), ("predicted", guessed)):
        if len(values) and not (int(values.min()) >= 0 and int(values.max()) < num_classes):
            raise ValueError(
                f"{name}: expected classes of 0 to {num_classes - 1}, got {int(values.min())} to "
                f"{int(values.max())}"
            )
    counts = torch.bincount(true * num_classes + guessed, minlength=num_classes**2)
    return counts.unflatten(0, (num_classes, num_classes))


def class_scores(confusion: Tensor) -> Tensor:
    """IoU and accuracy of each class.

    Args:
        confusion: (k, k), a row for each true class.

    Returns:
        (k, 2), a column for each of `COLUMNS`, float64. IoU is NaN for classes that are neither true nor
        predicted anywhere, accuracy for those nowhere true.
    """
    right, true, guessed = confusion.diagonal().double(), confusion.sum(1), confusion.sum(0)
    return torch.stack([right / (true + guessed - right), right / true], dim=1)


class IoUMetric(nn.Module):
    """Mean IoU and accuracy over classes, from the pixels of all images together.

    Args:
        classes: Names.
        tables: Also give the results by class and the confusion of classes.
    """

    def __init__(self, classes: Sequence[str], tables: bool = False) -> None:
        super().__init__()
        self.classes, self.tables = list(classes), tables
        self._confusion: Tensor | None = None  # no buffer: DDP would overwrite it with the first process'

    def update(self, labels_predicted: Tensor, labels: Tensor) -> None:
        """Add an image.

        Args:
            labels_predicted: Classes (h, w), integers.
            labels: The true ones (h, w), integers; pixels of 255 do not count.

        Raises:
            ValueError: The sizes differ, or there is a class of another number.
        """
        counts = count_pixels(labels_predicted, labels, len(self.classes))
        before = self._confusion
        self._confusion = counts if before is None else before.to(counts.device) + counts

    def compute(self) -> dict[str, Tensor]:
        """The results over all processes, each of which must call this.

        Returns:
            `mIoU` (mean over the classes that are true or predicted anywhere), `aAcc` (share of pixels that
            are right) and `mAcc` (mean over classes of the share of their pixels that is right). With
            `tables` also `per_class` (k, 2), a column for each of `COLUMNS`, and `confusion` (k, k), a row
            for each true class; of a single class it is (2, 2).

        Raises:
            DataError: No pixel counts.
        """
        counts = gather(None if self._confusion is None else self._confusion.cpu())
        confusion = sum(each for each in counts if each is not None)
        if not isinstance(confusion, Tensor) or not confusion.sum():
            raise DataError(
                "the evaluated images have no labelled pixel: IoU is not defined; check the masks of the "
                "split val"
            )
        per_class = class_scores(confusion)
        iou, accuracy = per_class.nanmean(0)
        results = {
            "mIoU": iou,
            "aAcc": confusion.diagonal().sum().double() / confusion.sum(),
            "mAcc": accuracy,
        }
        if self.tables:
            padding = (0, 1, 0, 1) if len(confusion) == 1 else ()  # one number would be taken for a score
            results |= {"per_class": per_class, "confusion": F.pad(confusion, padding)}
        return results

    def reset(self) -> None:
        """Forget all images."""
        self._confusion = None
