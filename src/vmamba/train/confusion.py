"""Tables and a picture of which class is taken for which."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vmamba.train.checkpoint import replacing, write_atomically

LABELLED = 30
"""So many classes have room for their names."""


def per_class(confusion: Tensor, classes: Sequence[str]) -> list[tuple[str, int, float]]:
    """Name, samples and accuracy of each class; NaN for one without samples.

    Args:
        confusion: Counts (classes, classes), a row for each true class.
        classes: Names.
    """
    samples, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
    return [
        (name, n, r / n if n else float("nan")) for name, n, r in zip(classes, samples, right, strict=True)
    ]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table that appears under `path` only when it is whole."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, table.getvalue())


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Shares of each true class as a PNG: a row for each, with names and numbers where there is room."""
    from matplotlib.figure import Figure

    number = len(classes)
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).tolist()
    labelled = number <= LABELLED
    side = max(4.5, 0.5 * number + 2) if labelled else 9
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if labelled:
        axes.set_xticks(range(number), classes, rotation=90)
        axes.set_yticks(range(number), classes)
        for row in range(number):
            for column in range(number):
                share = shares[row][column]
                if share >= 0.005:
                    colour = "white" if share > 0.5 else "black"
                    axes.text(
                        *(column, row, f"{100 * share:.0f}"),
                        ha="center",
                        va="center",
                        color=colour,
                        fontsize=8,
                    )
    axes.set(
        xlabel="predicted class", ylabel="true class", title="of each true class, in %" if labelled else ""
    )
    figure.colorbar(image, ax=axes, shrink=0.7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
