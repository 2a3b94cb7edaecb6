"""The order in which each route of a model reads an image (Figures 2, 3 and 12).

c channels, h height, w width, l = h·w positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.analysis.scans import Scan, record_scans
from vmamba.errors import UserError
from vmamba.files import save_figure
from vmamba.ops.routes import Routes, cross_scan, names_of, parse_routes

CASCADE = "cascade"
_COLOURS = "viridis"
_NUMBERED = 10
"""Longest side of a grid whose positions get their numbers written into them."""


class RouteError(UserError, ValueError):
    """There are no such routes, or the model has none."""


@dataclass(frozen=True, eq=False)
class Route:
    """A route, or several short ones side by side.

    Attributes:
        name: Its name.
        paths: The flat image positions (row·w + column) in the order in which they are read: one path through
            the image, or of the cascade one along each line.
        size: (h, w) of the image.
    """

    name: str
    paths: Sequence[Tensor]
    size: tuple[int, int]


def routes_of(routes: Routes, size: tuple[int, int]) -> list[Route]:
    """The routes of a `routes=` argument.

    Args:
        routes: As `vmamba.ops.selective_scan_2d` takes it, or "cascade".
        size: (h, w).

    Raises:
        RouteError: A route is unknown, or a permutation does not hold each position of the image once.
    """
    positions = torch.arange(size[0] * size[1]).view(size)
    if isinstance(routes, str) and routes == CASCADE:
        return [
            Route(name, [line.flip(0) if "reversed" in name else line for line in lines], size)
            for name, lines in (
                ("each row", positions),
                ("each row, reversed", positions),
                ("each column", positions.T),
                ("each column, reversed", positions.T),
            )
        ]
    try:
        codes, _ = parse_routes(routes, positions.device)
        orders = cross_scan(positions[None, :, :, None], routes)[0, :, :, 0]
    except (TypeError, ValueError) as error:
        raise RouteError(str(error)) from error
    return [Route(name, [path], size) for name, path in zip(names_of(codes), orders, strict=True)]


def routes_in(model: nn.Module, input_size: tuple[int, int, int]) -> dict[str, list[Route]]:
    """The different sets of routes in a model, by the names of their routes, each at its smallest image.

    Args:
        model: Any module that takes images; it runs in evaluation mode, once.
        input_size: (c, h, w).

    Raises:
        RouteError: The model has no selective scan.
    """
    like = next(model.parameters())
    recorded = record_scans(model, torch.zeros(1, *input_size, device=like.device, dtype=like.dtype))
    if not recorded:
        raise RouteError(f"model: expected one with selective scans, {type(model).__name__} has none")
    sets: dict[str, list[Route]] = {}
    for routes in map(_of_module, recorded.values()):
        title = ", ".join(route.name.replace("_", " ") for route in routes)
        if title not in sets or sets[title][0].paths[0].numel() > routes[0].paths[0].numel():
            sets[title] = routes
    return sets


def _of_module(scans: Sequence[Scan]) -> list[Route]:
    """The routes of the scans that one module runs on one image."""
    call = scans[0].call
    # The cascade scans each row as an image of height 1, along two routes, and then each column.
    if len(call.x) > 1 or (len(scans) > 1 and call.n_routes > 1):
        return routes_of(CASCADE, (call.x.shape[0], call.x.shape[2]))
    size = call.x.shape[1], call.x.shape[2]
    return [  # more than one scan where each route reads a part of the channels
        Route(name, [path], size)
        for scan in scans
        for name, path in zip(scan.route_names, scan.call.order().cpu(), strict=True)
    ]


def draw(sets: Mapping[str, Sequence[Route]], path: str | Path, image: Tensor | None = None) -> None:
    """Write routes as a PNG: a row for each set, lines coloured from the first position to the last.

    Args:
        sets: Titles and routes.
        path: Of the picture.
        image: To show behind the routes, (c, h, w) in [0, 1]; any size.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    columns = max(len(routes) for routes in sets.values())
    shapes = [routes[0].size for routes in sets.values()]
    heights = [2.6 * height / width + 0.6 for height, width in shapes]
    heights[-1] += 0.8  # the bar of colours
    figure = Figure(figsize=(2.7 * columns + 0.3, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(sets), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, (title, routes) in zip(rows, sets.items(), strict=True):
        row.suptitle(title, fontsize=13)
        grid = row.subplots(1, columns, squeeze=False)[0]
        for axes in grid[len(routes) :]:
            axes.axis("off")
        for axes, route in zip(grid, routes, strict=False):
            draw_route(axes, route, image)
    bar = figure.colorbar(
        ScalarMappable(cmap=_COLOURS), ax=rows[-1].axes, location="bottom", shrink=0.5, aspect=40
    )
    bar.set_ticks([0, 1], labels=["read first", "read last"])
    save_figure(figure, path, dpi=110)


def draw_route(axes: Any, route: Route, image: Tensor | None = None) -> None:
    """Draw one route: a circle where it begins, an arrow to its last position.

    Args:
        axes: Of matplotlib.
        route: The route.
        image: To show behind it, (c, h, w) in [0, 1].
    """
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.patheffects import withStroke

    height, width = route.size
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=[], yticks=[])
    if image is not None:
        axes.imshow(
            image.movedim(0, -1).squeeze(-1).numpy(), alpha=0.35, extent=(0, width, height, 0), cmap="gray"
        )
    colours = colormaps[_COLOURS]
    numbers = max(height, width) <= _NUMBERED
    for positions in route.paths:
        points = torch.stack([positions % width, positions // width], 1).numpy() + 0.5
        shares = torch.linspace(0, 1, len(points)).numpy()
        segments = list(pairwise(points))
        axes.add_collection(LineCollection(segments, colors=colours(shares[1:]), linewidths=2.5, zorder=1))
        axes.plot(*points[0], "o", color=colours(0.0), markersize=8, zorder=2)
        if len(points) > 1:
            arrow = {"arrowstyle": "-|>", "color": colours(1.0), "lw": 2.5, "mutation_scale": 16}
            axes.annotate("", points[-1], points[-2], arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
        if numbers:
            for number, (x, y) in enumerate(points.tolist(), 1):
                label = axes.text(x + 0.08, y - 0.1, str(number), fontsize=8, zorder=3)
                label.set_path_effects([withStroke(linewidth=2, foreground="white")])
    axes.set_title(route.name.replace("_", " "), fontsize=11)
