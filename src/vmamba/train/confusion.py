"""Tables and a picture of which class is taken for which."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vmamba.files import replacing, write_atomically

LABELLED = 30
"""So many classes have room for their names."""

CELLS = 250
"""So many cells a side can be told apart in the picture."""


@dataclass(frozen=True)
class ClassResult:
    """How the samples of a class were judged.

    Attributes:
        name: Of the class.
        samples: Of it.
        accuracy: Share of them that was taken for it; None without samples.
        precision: Share that it is of what was taken for it; None if nothing was.
        taken_for: The class that it was taken for most often by mistake; "" without mistakes.
        taken_for_share: How often, of its samples.
    """

    name: str
    samples: int
    accuracy: float | None
    precision: float | None
    taken_for: str
    taken_for_share: float


def per_class(confusion: Tensor, classes: Sequence[str]) -> list[ClassResult]:
    """A result for each class.

    Args:
        confusion: Counts (classes, classes), a row for each true class.
        classes: Names.
    """
    samples, taken, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    mistakes, other = (confusion - right.diag()).max(1)
    columns = [column.tolist() for column in (samples, taken, right, mistakes, other)]
    return [
        ClassResult(
            name,
            samples=n,
            accuracy=r / n if n else None,
            precision=r / p if p else None,
            taken_for=classes[o] if m else "",
            taken_for_share=m / n if m else 0.0,
        )
        for name, n, p, r, m, o in zip(classes, *columns, strict=True)
    ]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table that appears under `path` only when it is whole."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, table.getvalue())


def draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """Shares of each true class as a PNG: a row for each, with names and numbers where there is room.

    Of many classes a cell shows the largest share in a block of neighbours, so that no mistake gets lost.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    number = len(classes)
    block = math.ceil(number / CELLS)
    parts = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    shares = F.max_pool2d(parts[None], block, ceil_mode=True)[0].tolist()
    labelled = number <= LABELLED
    side = max(4.5, 0.5 * number + 2) if labelled else 9
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    edge = block * len(shares) - 0.5
    image = axes.imshow(
        shares,
        cmap="Blues",
        norm=PowerNorm(1 if labelled else 0.4, 0, 1),  # else rare mistakes cannot be seen
        interpolation="nearest",
        extent=(-0.5, edge, edge, -0.5),
    )
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
    title = "of each true class, in %" if labelled else "share of each true class"
    if block > 1:
        title = f"largest share of a true class within {block} × {block} cells"
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(image, ax=axes, shrink=0.7)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
