"""The figure of a scan as attention, as the paper's Figures 4-7 show it, and each of its panels by itself.

h height, w width, l = h·w positions, k routes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmamba.analysis.attention import ScanAttention
from vmamba.files import save_figure

ROW_LABELS = {"CB": "Q Kᵀ", "CwBw": "Q Kᵀ, decay", "ww": "decay"}
SECTIONS = {
    "query": "what the starred patch receives from the image",
    "map": "what every position (row) receives from every other (column), in the order of each route",
    "progress": "what the state of the first route holds on the way",
}
_COLOURS = "viridis"
_NOT_REACHED = "0.88"
"""The grey of positions that a route has not visited yet."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture of the figure.

    Attributes:
        section: One of `SECTIONS`.
        kind: One of `vmamba.analysis.attention.KINDS`.
        with_delta: Whether the values are multiplied by δ.
        column: Its title.
        values: (h, w), or (l, l) in section "map"; NaN where there is none.
        star: Row and column to be marked.
    """

    section: str
    kind: str
    with_delta: bool
    column: str
    values: Tensor
    star: tuple[int, int] | None = None

    @property
    def row(self) -> str:
        """The label of its row."""
        return ROW_LABELS[self.kind] + (", δ" if self.with_delta else "")

    @property
    def name(self) -> str:
        """A name for files, all ASCII: "query-CwBw-delta-sum", "progress-CB-1_4"."""
        words = [self.section, self.kind, *(["delta"] if self.with_delta else []), self.column]
        return "-".join(words).replace(" ", "_").replace("\N{FRACTION SLASH}", "_")


def panels(
    scan: ScanAttention,
    position: int,
    kinds: Sequence[str] = tuple(ROW_LABELS),
    *,
    deltas: Sequence[bool] = (False,),
    maps: bool = True,
) -> list[Panel]:
    """The panels of all sections.

    Args:
        scan: From `scan_attention`.
        position: Flat image position of the query, see `ScanAttention.position`.
        kinds: Of `vmamba.analysis.attention.KINDS`.
        deltas: False for maps without δ, True for maps with it.
        maps: Whether to compute the full maps, l² values a route.

    Raises:
        AttentionError: The query lies outside of the image, a kind is unknown, or the full maps do not fit
            into memory.
    """
    if maps:
        scan.check_memory()
    each = [(kind, delta) for kind in kinds for delta in deltas]
    result = [panel for kind, delta in each for panel in _query(scan, position, kind, delta)]
    if maps:
        result += [panel for kind, delta in each for panel in _maps(scan, kind, delta)]
    return result + [panel for kind, delta in each for panel in _progress(scan, kind, delta)]


def _titles(scan: ScanAttention) -> list[str]:
    """The name of each route, with its number where several have one name."""
    names = [route.replace("_", " ") for route in scan.routes]
    return [f"{name} {k}" if names.count(name) > 1 else name for k, name in enumerate(names)]


def _query(scan: ScanAttention, position: int, kind: str, delta: bool) -> Iterator[Panel]:
    rows, reached = scan.row(position, kind, delta), scan.reached(position)
    star = divmod(position, scan.size[1])
    for title, row, visited in zip(_titles(scan), rows, reached, strict=True):
        yield Panel("query", kind, delta, title, row.where(visited, torch.nan), star)
    yield Panel("query", kind, delta, "sum", rows.sum(0), star)
    if delta or kind != "ww":  # the decay of a position to itself is 1 everywhere
        yield Panel("query", kind, delta, "diagonal", scan.diagonal(kind, delta))


def _maps(scan: ScanAttention, kind: str, delta: bool) -> Iterator[Panel]:
    maps = scan.maps(kind, delta)
    later = torch.ones(maps.maps.shape[1:], dtype=torch.bool).triu(1)
    for title, values in zip(_titles(scan), maps.maps, strict=True):
        yield Panel("map", kind, delta, title, values.masked_fill(later, torch.nan))
    yield Panel("map", kind, delta, "sum", maps.merged())


def _progress(scan: ScanAttention, kind: str, delta: bool) -> Iterator[Panel]:
    positions, rows = scan.progress(0, kind, delta)
    for title, position, row in zip(("1⁄4", "1⁄2", "3⁄4", "end"), positions, rows, strict=True):
        values = row.where(scan.reached(position)[0], torch.nan)
        yield Panel("progress", kind, delta, title, values, divmod(position, scan.size[1]))


def draw(
    shown: Sequence[Panel], image: Tensor, query: tuple[float, float], title: str, path: str | Path
) -> None:
    """Write the figure as a PNG: the sections below each other, a row for each kind of map.

    Args:
        shown: From `panels`.
        image: To show, (c, h, w) in [0, 1].
        query: (x, y) of the star in it, each in [0, 1).
        title: Of the figure.
        path: Of the picture.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    sections = {name: [panel for panel in shown if panel.section == name] for name in SECTIONS}
    sections = {name: members for name, members in sections.items() if members}
    rows = [len({panel.row for panel in members}) for members in sections.values()]
    columns = 1 + max(len({panel.column for panel in members}) for members in sections.values())
    size = (1.7 * columns + 0.4, 1.7 * sum(rows) + 0.7 * len(rows) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=14)
    heights = [1.7 * number + 0.7 for number in rows]
    subfigures = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for subfigure, (name, members) in zip(subfigures, sections.items(), strict=True):
        subfigure.suptitle(SECTIONS[name], fontsize=12)
        grid = subfigure.subplots(len({panel.row for panel in members}), columns, squeeze=False)
        _fill(grid, members)
        if name == "query":
            _show_image(grid[0, -1], image, query)
    bar = figure.colorbar(
        ScalarMappable(cmap=_COLOURS), ax=subfigures[-1].axes, location="bottom", shrink=0.5, aspect=40
    )
    bar.set_ticks([0, 1], labels=["least", "largest"])
    bar.set_label("colours of each panel are of its own values; grey: not reached yet", fontsize=11)
    save_figure(figure, path, dpi=100)


def draw_panel(panel: Panel, path: str | Path) -> None:
    """Write one panel as a PNG, with a bar of its values.

    Args:
        panel: From `panels`.
        path: Of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes = figure.subplots()
    picture = _show(axes, panel)
    axes.set_title(f"{panel.row}: {panel.column}")
    figure.colorbar(picture, ax=axes, label="mean over channels")
    save_figure(figure, path, dpi=100)


def _fill(grid: Any, members: Sequence[Panel]) -> None:
    """Draw panels into a grid of axes: rows by kind, columns by title; the other axes stay empty."""
    for axes in grid.flat:
        axes.axis("off")
    rows, columns = (
        list(dict.fromkeys(getattr(each, name) for each in members)) for name in ("row", "column")
    )
    for panel in members:
        row, column = rows.index(panel.row), columns.index(panel.column)
        axes = grid[row, column]
        axes.axis("on")
        _show(axes, panel)
        if row == 0:
            axes.set_title(panel.column, fontsize=11)
        if column == 0:
            axes.set_ylabel(panel.row, fontsize=11)


def _show(axes: Any, panel: Panel) -> Any:
    picture = axes.imshow(panel.values.numpy(), cmap=_COLOURS, interpolation="nearest")
    axes.set_facecolor(_NOT_REACHED)
    if panel.star is not None:
        row, column = panel.star
        _mark(axes, column, row)
    axes.set_xticks([])
    axes.set_yticks([])
    return picture


def _show_image(axes: Any, image: Tensor, query: tuple[float, float]) -> None:
    channels, height, width = image.shape
    axes.imshow(image.permute(1, 2, 0).numpy() if channels == 3 else image[0].numpy(), cmap="gray")
    _mark(axes, query[0] * width, query[1] * height)
    axes.set_title("image", fontsize=11)


def _mark(axes: Any, x: float, y: float) -> None:
    axes.plot(x, y, "*", color="red", markeredgecolor="white", markersize=12)
