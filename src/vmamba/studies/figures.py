"""The studies' figures. A figure shows the rows that were measured, and the paper's values beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmamba.studies.study import INFERENCE, INFERENCE_MEMORY, TRAINING, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURED, QUOTED = "#1f5fa8", "#b8b8b8"
"""Colours of what was measured here and of what the paper states."""


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _legend(axes: Any) -> None:
    if axes.get_legend_handles_labels()[0]:  # there is something to name
        axes.legend(fontsize=8)


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, dpi=120, format="png")


def draw_throughput(rows: Sequence[Row], path: Path) -> None:
    """Accuracy, as the paper states it, over the images/s measured here; areas by the number of parameters.

    Args:
        rows: Of the study.
        path: Of the PNG.
    """
    figure = _figure(8, 5)
    axes = figure.subplots()
    points = [row for row in rows if row.inference and "top-1, %" in row.subject.quoted]
    for row in points:
        x, y = row.measured[INFERENCE], row.subject.quoted["top-1, %"]
        ours = "vmamba" in row.subject.model
        axes.scatter(x, y, s=2 * row.measured["parameters, M"], color=MEASURED if ours else QUOTED, alpha=0.8)
        axes.annotate(row.subject.label, (x, y), fontsize=7, xytext=(5, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="images/s in inference, measured", ylabel="top-1 on ImageNet, %, quoted")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_resolution(rows: Sequence[Row], path: Path) -> None:
    """Speed, peak memory and multiply-adds over the size of the image, each relative to the smallest size.

    Args:
        rows: Of the study.
        path: Of the PNG.
    """
    titles = {
        INFERENCE: "time of an image",
        INFERENCE_MEMORY: "peak memory of an image",
        "GMACs": "multiply-adds",
    }
    columns = [column for column in titles if any(column in row.measured for row in rows)]
    figure = _figure(4 * len(columns), 4.4)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    sizes = sorted({row.subject.size for row in rows})
    for axes, column in zip(panels, columns, strict=True):
        for number, label in enumerate(dict.fromkeys(row.subject.label for row in rows)):
            of_model = [row for row in rows if row.subject.label == label]
            measured = [(row.subject.size, row.measured.get(column)) for row in of_model]
            _grown(axes, column, measured, color=f"C{number}", marker="o", label=label)
            if column == INFERENCE:
                quoted = [(row.subject.size, row.subject.quoted.get(column)) for row in of_model]
                _grown(axes, column, quoted, color=f"C{number}", linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="side of the image, pixels", title=titles[column])
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    dotted = " (dotted: the paper's)" if INFERENCE in columns else ""
    panels[0].set_ylabel(f"relative to the smallest size{dotted}")
    _legend(panels[0])
    _save(figure, path)


def _grown(axes: Any, column: str, points: Sequence[tuple[int, float | None]], **style: Any) -> None:
    """A line through the known values over the first of them; of a speed, its inverse, which is time."""
    known = [(size, value) for size, value in points if value]
    if known:
        first = known[0][1]
        ys = [first / value if column == INFERENCE else value / first for _, value in known]
        axes.plot([size for size, _ in known], ys, **style)


def draw_ladder(rows: Sequence[Row], path: Path) -> None:
    """Images/s of each step relative to the first, measured and quoted, in inference and training.

    Args:
        rows: Of the study.
        path: Of the PNG.
    """
    _bars(rows, path, "relative to V0")


def draw_patterns(rows: Sequence[Row], path: Path) -> None:
    """Images/s of each pattern relative to the cross, measured and quoted, in inference and training.

    Args:
        rows: Of the study.
        path: Of the PNG.
    """
    _bars(rows, path, "relative to cross")


def _bars(rows: Sequence[Row], path: Path, ylabel: str) -> None:
    columns = [c for c in (INFERENCE, TRAINING) if any(c in row.measured for row in rows)] or [INFERENCE]
    figure = _figure(10, 0.5 + 0.45 * len(rows))
    for axes, column in zip(
        figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True
    ):
        for offset, values, colour, label in (
            (-0.2, [row.measured.get(column) for row in rows], MEASURED, "measured here"),
            (0.2, [row.subject.quoted.get(column) for row in rows], QUOTED, "quoted from the paper"),
        ):
            _relative(axes, values, offset, colour, label)
        axes.set_yticks(range(len(rows)), [row.subject.label for row in rows])
        axes.set_xlabel(f"{column}, {ylabel}")
        axes.grid(alpha=0.3, axis="x")
        _legend(axes)
    figure.axes[0].invert_yaxis()  # shared: the first row is at the top
    _save(figure, path)


def _relative(axes: Any, values: Sequence[float | None], offset: float, colour: str, label: str) -> None:
    first = next((value for value in values if value), None)
    places = [place for place, value in enumerate(values) if value]
    if first is None:
        return
    bars = axes.barh(
        [place + offset for place in places],
        [value / first for value in values if value],
        height=0.38,
        color=colour,
        label=label,
    )
    axes.bar_label(bars, [f"{value:,.3g}" for value in values if value], fontsize=7, padding=2)
