"""Tables and a picture of which class is predicted as which."""

import csv
import io
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vmamba.files import save_figure, write_atomically

LABELLED = 30
"""Most classes for which the picture has room for names."""

CELLS = 250
"""Most cells along a side that can be distinguished in the picture."""


@dataclass(frozen=True)
class ClassResult:
    """How the samples of one class were classified.

    Attributes:
        name: The class.
        samples: How many samples it has.
        accuracy: Share of its samples predicted as this class (recall); None without samples.
        precision: Share of the samples predicted as this class that belong to it; None if there are none.
        mistaken_for: The wrong class most often predicted for its samples; "" without mistakes.
        mistaken_for_share: Share of its samples with that prediction.
    """

    name: str
    samples: int
    accuracy: float | None
    precision: float | None
    mistaken_for: str
    mistaken_for_share: float


def per_class(confusion: Tensor, classes: Sequence[str]) -> list[ClassResult]:
    """A result for each class.

    Args:
        confusion: Counts (classes, classes), a row for each true class.
        classes: Names.
    """
    right = confusion.diagonal()
    mistakes, wrong_classes = (confusion - right.diag()).max(1)
    results = []
    for i, name in enumerate(classes):
        samples, predicted, correct = (
            int(count) for count in (confusion[i].sum(), confusion[:, i].sum(), right[i])
        )
        most = int(mistakes[i])
        results.append(
            ClassResult(
                name,
                samples=samples,
                accuracy=correct / samples if samples else None,
                precision=correct / predicted if predicted else None,
                mistaken_for=classes[int(wrong_classes[i])] if most else "",
                mistaken_for_share=most / samples if most else 0.0,
            )
        )
    return results


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table that appears under `path` only when it is whole."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, table.getvalue())


def score_cell(value: float) -> str:
    """A score in a table; NaN, where it is not defined, as an empty cell."""
    return "" if math.isnan(value) else f"{value:.6f}"


def draw_confusion(
    confusion: Tensor,
    classes: Sequence[str],
    path: Path,
    title: str = "How each class is predicted",
    counts: str = "samples",
) -> None:
    """Shares of each true class in percent as a PNG: a row for each, with names and numbers if they fit.

    With many classes a cell shows the largest share in a block of neighbours, so that no mistake is hidden.

    Args:
        confusion: Counts (classes, classes), a row for each true class.
        classes: Names.
        path: Of the PNG.
        title: Above the picture.
        counts: What `confusion` counts.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    number = len(classes)
    block = math.ceil(number / CELLS)
    percent = 100 * confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    cells = F.max_pool2d(percent[None], block, ceil_mode=True)[0].tolist()
    labelled = number <= LABELLED
    names = [shortened(name) for name in classes]
    side = max(4.5, 0.5 * number + 2 + 0.07 * max(map(len, names))) if labelled else 9
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    edge = block * len(cells) - 0.5
    image = axes.imshow(
        cells,
        cmap="Blues",
        norm=PowerNorm(1 if labelled else 0.4, 0, 100),  # else rare mistakes cannot be seen
        interpolation="nearest",
        extent=(-0.5, edge, edge, -0.5),
    )
    if labelled:
        _label(axes, cells, names, confusion.sum(1).tolist())
    if block > 1:
        title += f"\nlargest share within {block} × {block} classes"
    across, down = ("", f" ({counts})") if labelled else (", by number", ", by number")
    axes.set(xlabel=f"predicted class{across}", ylabel=f"true class{down}")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.7, label="% of the true class")
    with without_missing_glyphs():
        save_figure(figure, path, dpi=120)


@contextmanager
def without_missing_glyphs() -> Iterator[None]:
    """Save a figure without warnings: a script that the font lacks shows as boxes, the CSV has the names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*[Gg]lyph .* missing from.*font")
        yield


def shortened(name: str, most: int = 24) -> str:
    """A name for a figure: not long, and without a formula for matplotlib."""
    short = name if len(name) <= most else f"{name[: most - 1]}…"
    return short.replace("$", r"\$")


def _label(axes: Any, cells: Sequence[Sequence[float]], names: Sequence[str], counts: Sequence[int]) -> None:
    """Names beside the rows and columns, what was counted beside the rows, percentages in the cells."""
    axes.set_xticks(range(len(names)), names, rotation=90)
    rows = [f"{name} ({number:,})" for name, number in zip(names, counts, strict=True)]
    axes.set_yticks(range(len(names)), rows)
    for row, values in enumerate(cells):
        for column, percent in enumerate(values):
            if percent >= 0.5:
                colour = "white" if percent > 50 else "black"
                text = f"{percent:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
