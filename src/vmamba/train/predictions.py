"""What a classifier predicted for each sample of an evaluation, and its mistakes."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from vmamba.data.contact_sheet import Cell, draw_sheet, picture
from vmamba.errors import DataError
from vmamba.train.confusion import write_csv
from vmamba.train.task import SamplePrediction

TOP = 5
"""Classes kept for each sample."""

SHOWN = 60
"""Most mistakes in the picture."""


class PredictedClasses(NamedTuple):
    """What was predicted for a sample; classes by number.

    Attributes:
        label: The true class.
        label_probability: The probability given to it.
        classes: The likeliest classes, the likeliest first.
        probabilities: Theirs.
    """

    label: int
    label_probability: float
    classes: list[int]
    probabilities: list[float]


def predicted_classes(logits: Tensor, labels: Tensor) -> list[PredictedClasses]:
    """The likeliest classes of each sample; of equals the first, as argmax has it.

    Args:
        logits: (b, classes).
        labels: The true classes, (b,).
    """
    probabilities = logits.softmax(1)
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    order = logits.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
    values = (labels, of_label, order, probabilities.gather(1, order))
    return [PredictedClasses(*row) for row in zip(*(value.tolist() for value in values), strict=True)]


def most_confident_mistakes(predictions: Iterable[SamplePrediction]) -> list[SamplePrediction]:
    """The samples whose likeliest class is not the true one, by its probability, highest first."""
    mistakes = [each for each in predictions if each.value.classes[0] != each.value.label]
    return sorted(mistakes, key=lambda each: -each.value.probabilities[0])


def write_predictions(predictions: Iterable[SamplePrediction], classes: Sequence[str], path: Path) -> None:
    """Write a row for each sample as CSV.

    Args:
        predictions: To write, with values of `PredictedClasses`.
        classes: Names.
        path: Of the file.
    """
    columns = ["image", "true_class", "true_class_probability", "predicted_class", "probability"]
    for place in range(2, min(TOP, len(classes)) + 1):
        columns += [f"predicted_class_{place}", f"probability_{place}"]
    write_csv(path, columns, (_row(each, classes) for each in predictions))


def _row(prediction: SamplePrediction, classes: Sequence[str]) -> list[Any]:
    value: PredictedClasses = prediction.value
    row = [prediction.name, classes[value.label], f"{value.label_probability:.6f}"]
    for number, probability in zip(value.classes, value.probabilities, strict=True):
        row += [classes[number], f"{probability:.6f}"]
    return row


def draw_mistakes(
    mistakes: Sequence[SamplePrediction],
    classes: Sequence[str],
    read: Callable[[int], Any],
    path: Path,
) -> None:
    """Draw the first mistakes as a contact sheet; without mistakes remove an earlier one.

    Args:
        mistakes: The most confident first.
        classes: Names.
        read: An image by its index; it is read again, so that no images are held in memory.
        path: Of the PNG.
    """
    if not mistakes:
        path.unlink(missing_ok=True)
        return
    draw_sheet([_cell(each, classes, read) for each in mistakes[:SHOWN]], path)


def _cell(mistake: SamplePrediction, classes: Sequence[str], read: Callable[[int], Any]) -> Cell:
    value: PredictedClasses = mistake.value
    try:
        image = picture(read(mistake.index))
    except DataError:  # it could be read before
        image = None
    title = f"{classes[value.classes[0]]}, not {classes[value.label]}"
    return Cell(mistake.name, image, title, f"{value.probabilities[0]:.0%}")
