"""Line charts as numbers that a template draws as SVG, and in words for who cannot see them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 12, 44
"""Size of a chart and of the margins around its plot, in units of the SVG."""

MOST_MARKERS = 40
"""Points of a line from which on they are not marked one by one."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Values of one run over the epochs.

    Attributes:
        label: Of the legend.
        run: The run's number, which gives the colour and the marker.
        kind: "train", "val" or "average" (of the weights), which gives the dashes.
        points: x and y; y may be NaN.
    """

    label: str
    run: int
    kind: str
    points: Sequence[Point]


@dataclass(frozen=True)
class DrawnLine:
    """A line in the SVG's units.

    Attributes:
        line: What is drawn.
        segments: The points of each stretch without a gap.
        markers: x, y and what stands there in words.
        summary: The line in words.
    """

    line: Line
    segments: Sequence[Sequence[Point]]
    markers: Sequence[tuple[float, float, str]]
    summary: str


@dataclass(frozen=True)
class Chart:
    """A chart in the SVG's units.

    Attributes:
        title: What is drawn.
        unit: Of the horizontal axis.
        lines: With at least one finite point each.
        x_ticks: Positions and labels.
        y_ticks: Positions and labels.
    """

    title: str
    unit: str
    lines: Sequence[DrawnLine]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]


def chart(title: str, unit: str, lines: Sequence[Line]) -> Chart | None:
    """Lay a chart out; None if no line has a finite point.

    Args:
        title: What is drawn.
        unit: Of the horizontal axis, such as "epoch".
        lines: To draw.
    """
    lines = [line for line in lines if any(math.isfinite(y) for _, y in line.points)]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    y_ticks = list(ticks(min(ys), max(ys)))
    x_scale = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_scale = _Scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    x_ticks = [x for x in ticks(min(xs), max(xs), whole=True) if min(xs) <= x <= max(xs)]
    return Chart(
        title,
        unit,
        [_drawn(line, unit, x_scale, y_scale) for line in lines],
        [(x_scale(x), f"{x:,.0f}") for x in x_ticks],
        [(y_scale(y), f"{y:.6g}") for y in y_ticks],
    )


def ticks(low: float, high: float, most: int = 7, whole: bool = False) -> Iterator[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose a range.

    Args:
        low: Of the range.
        high: Of the range.
        most: The range is divided into fewer steps than this.
        whole: Only whole numbers.
    """
    if low == high:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    exponent = math.floor(math.log10((high - low) / most))
    steps = [factor * 10.0**power for power in (exponent, exponent + 1) for factor in (1, 2, 5)]
    step = next(each for each in steps if (high - low) / each < most)
    if whole:
        step = max(1.0, step)
    for number in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1):
        yield round(number * step, 12)


class _Scale:
    """From values to positions."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.span, self.start, self.length = low, high - low, start, end - start

    def __call__(self, value: float) -> float:
        share = (value - self.low) / self.span if self.span else 0.5
        return round(self.start + share * self.length, 2)


def _drawn(line: Line, unit: str, x_scale: _Scale, y_scale: _Scale) -> DrawnLine:
    segments: list[list[Point]] = [[]]
    markers = []
    for x, y in line.points:
        if not math.isfinite(y):
            segments.append([])
            continue
        place = (x_scale(x), y_scale(y))
        segments[-1].append(place)
        markers.append((*place, f"{line.label}, {unit} {x:g}: {y:.6g}"))
    whole = [segment for segment in segments if segment]
    shown = markers if len(markers) <= MOST_MARKERS or len(whole) == len(markers) else []
    return DrawnLine(line, whole, shown, _summary(line, unit))


def _summary(line: Line, unit: str) -> str:
    finite = [(x, y) for x, y in line.points if math.isfinite(y)]
    (first_x, first), (last_x, last) = finite[0], finite[-1]
    if len(finite) == 1:
        return f"{line.label}: {first:.4g} at {unit} {first_x:g}"
    low_x, low = min(finite, key=lambda point: point[1])
    high_x, high = max(finite, key=lambda point: point[1])
    return (
        f"{line.label}: {first:.4g} at {unit} {first_x:g}, {last:.4g} at {unit} {last_x:g}; "
        f"lowest {low:.4g} at {low_x:g}, highest {high:.4g} at {high_x:g}"
    )
