"""The studies' figures. A figure shows the rows that were measured, and the paper's values beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmamba.studies.study import INFERENCE, INFERENCE_MEMORY, TRAINING, Row
from vmamba.studies.writing import number

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
    """Accuracy, as the paper states it, over the speed measured here; areas by the number of parameters.

    The speed is relative to that of the first model, which each group is timed beside.

    Args:
        rows: Of the study.
        path: Of the PNG.
    """
    from matplotlib.ticker import LogLocator

    figure = _figure(9, 6.5)
    axes = figure.subplots()
    points = {}
    for row in rows:
        if row.inference is None or "top-1, %" not in row.subject.quoted:
            continue
        x, y = 1 / row.inference.ratio.median, row.subject.quoted["top-1, %"]
        colour = MEASURED if "vmamba" in row.subject.model else QUOTED
        diameter = (2 * row.measured["parameters, M"]) ** 0.5
        axes.scatter(x, y, s=diameter**2, color=colour, alpha=0.8)
        size = "" if row.subject.size == 224 else f", {row.subject.size}²"
        points[row.subject.label + size] = (x, y, diameter / 2)
    first = f", relative to {rows[0].subject.label}" if rows else ""
    axes.set(
        xscale="log",
        xlabel=f"images/s in inference, measured{first}",
        ylabel="top-1 on ImageNet, %, quoted from the paper",
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    _name(axes, points)
    _save(figure, path)


def _name(axes: Any, circles: Mapping[str, tuple[float, float, float]]) -> None:
    """Write the name of each circle (x, y, radius in points) beside it, over no other circle or name."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # lays the axes out
    pixels = axes.figure.dpi / 72
    taken = []
    for x, y, radius in circles.values():
        centre = axes.transData.transform((x, y))
        taken.append(Bbox([centre - pixels * radius, centre + pixels * radius]))
    for name, (x, y, radius) in sorted(circles.items(), key=lambda item: item[1][1]):
        style = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        side = radius + 3
        for dx, dy in [(dx, dy) for dy in (0, 9, -9, 18, -18, 27, -27) for dx in (side, -side)]:
            text = axes.annotate(name, (x, y), (dx, dy), ha="left" if dx > 0 else "right", **style)
            box = text.get_window_extent()
            if axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and not box.count_overlaps(taken):
                break
            text.remove()
        else:
            text = axes.annotate(name, (x, y), (side, 0), **style)
        taken.append(text.get_window_extent())


def draw_resolution(rows: Sequence[Row], path: Path) -> None:
    """Speed, peak memory and multiply-adds over the size of the image, each relative to the smallest size.

    Args:
        rows: Of the study.
        path: Of the PNG.
    """
    from matplotlib.ticker import LogLocator

    titles = {
        INFERENCE: "time of an image",
        INFERENCE_MEMORY: "peak memory of an image",
        "GMACs": "multiply-adds",
    }
    columns = [column for column in titles if any(column in row.measured for row in rows)]
    figure = _figure(4 * len(columns), 4.4)
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    sizes = sorted({row.subject.size for row in rows})
    for axes, column in zip(panels, columns, strict=True):
        for i, label in enumerate(dict.fromkeys(row.subject.label for row in rows)):
            of_model = [row for row in rows if row.subject.label == label]
            measured = [(row.subject.size, row.measured.get(column)) for row in of_model]
            _grown(axes, column, measured, color=f"C{i}", marker="o", label=label)
            if column == INFERENCE:
                quoted = [(row.subject.size, row.subject.quoted.get(column)) for row in of_model]
                _grown(axes, column, quoted, color=f"C{i}", linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="side of the image, pixels", title=titles[column])
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
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


def _bars(rows: Sequence[Row], path: Path, relative_to: str) -> None:
    columns = [c for c in (INFERENCE, TRAINING) if any(c in row.measured for row in rows)] or [INFERENCE]
    figure = _figure(10, 0.8 + 0.45 * len(rows))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        timed = {place: row.speeds[column] for place, row in enumerate(rows) if column in row.speeds}
        quoted = {p: row.subject.quoted[column] for p, row in enumerate(rows) if column in row.subject.quoted}
        _draw_bars(
            axes,
            {place - 0.2: 1 / speed.ratio.median for place, speed in timed.items()},
            [speed.images_per_second for speed in timed.values()],
            MEASURED,
            "measured here, with quartiles over the rounds",
            [(1 / speed.ratio.high, 1 / speed.ratio.low) for speed in timed.values()],
        )
        first = next(iter(quoted.values()), 1)
        relative = {place + 0.2: value / first for place, value in quoted.items()}
        _draw_bars(axes, relative, list(quoted.values()), QUOTED, "quoted from the paper")
        axes.set_yticks(range(len(rows)), [row.subject.label for row in rows])
        axes.set_xlabel(f"{column}, {relative_to}")
        axes.grid(alpha=0.3, axis="x")
        axes.margins(x=0.15)  # for the labels of the longest bars
    figure.axes[0].invert_yaxis()  # shared: the first row is at the top
    named = figure.axes[0].get_legend_handles_labels()
    if named[0]:
        figure.legend(*named, loc="outside lower center", ncols=2, fontsize=8)
    _save(figure, path)


def _draw_bars(
    axes: Any,
    lengths: Mapping[float, float],
    labels: Sequence[float],
    colour: str,
    name: str,
    ranges: Sequence[tuple[float, float]] = (),
) -> None:
    """Bars, length by place, each with images/s as its label and the range of its length if there is one."""
    if not lengths:
        return
    values = list(lengths.values())
    bars = axes.barh(list(lengths), values, height=0.38, color=colour, label=name)
    ends = values
    if ranges:
        below = [value - low for value, (low, _) in zip(values, ranges, strict=True)]
        above = [high - value for value, (_, high) in zip(values, ranges, strict=True)]
        axes.errorbar(values, list(lengths), xerr=[below, above], fmt="none", ecolor="black", elinewidth=0.8)
        ends = [high for _, high in ranges]
    for bar, end, label in zip(bars, ends, labels, strict=True):
        place = (end, bar.get_y() + bar.get_height() / 2)
        axes.annotate(number(label), place, (3, 0), textcoords="offset points", va="center", fontsize=7)
