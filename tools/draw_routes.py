"""Draw docs/assets/routes.png: the four routes of the 2D selective scan, and what one position then sees.

    python tools/draw_routes.py [--out docs/assets/routes.png]

The upper row shows the order in which `vmamba.ops.cross_scan` reads a 7×7 map. Below, one scan runs over
random features: the gradient of the marked position's output with respect to every input, for the sum of the
routes and for each alone, every map scaled by its own largest value.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import vmamba
from vmamba.ops import NAMED_ROUTES, cross_scan, selective_scan_2d

SIZE = 7
PIXELS = 224
QUERY = (3, 3)
"""Row and column of the marked position."""


def landscape(pixels: int) -> np.ndarray:
    """A sunset over hills, (pixels, pixels, 3) in [0, 1], generated so that no licence applies."""
    y, x = np.mgrid[0:pixels, 0:pixels] / pixels
    top, bottom = np.array([0.16, 0.24, 0.48]), np.array([0.98, 0.70, 0.45])
    image = top + (bottom - top) * np.clip(y * 1.5, 0, 1)[..., None]
    sun = np.hypot(x - 0.66, y - 0.42)
    image += np.exp(-((sun / 0.22) ** 2))[..., None] * np.array([0.35, 0.25, 0.05])
    image[sun < 0.085] = (1.0, 0.93, 0.70)
    hills = (
        (0.60, 0.06, 2.0, 0.3, (0.36, 0.33, 0.52)),
        (0.70, 0.05, 3.1, 2.1, (0.23, 0.27, 0.41)),
        (0.82, 0.04, 4.3, 4.0, (0.12, 0.18, 0.26)),
    )
    for height, swing, waves, phase, colour in hills:
        image[y > height + swing * np.sin(2 * np.pi * waves * x / 2 + phase)] = colour
    return np.clip(image, 0, 1)


def visiting_order() -> Tensor:
    """Flat positions in the order in which each route visits them, (4, SIZE²)."""
    positions = torch.arange(SIZE * SIZE, dtype=torch.float32).view(1, SIZE, SIZE, 1)
    return cross_scan(positions, "cross")[0, :, :, 0].long()


def seen_from_query(routes: tuple[str, ...]) -> Tensor:
    """How strongly each input moves the output at QUERY, (SIZE, SIZE), summed over channels."""
    torch.manual_seed(0)
    channels, n_routes = 64, len(routes)
    x = torch.randn(1, SIZE, SIZE, channels, requires_grad=True)
    delta = torch.full((1, SIZE, SIZE, n_routes, channels), 0.08)
    A = -torch.ones(n_routes, channels, 1)
    B, C = torch.ones(2, 1, SIZE, SIZE, n_routes, 1)
    y = selective_scan_2d(x, delta, A, B, C, delta_softplus=False, routes=routes)
    (gradient,) = torch.autograd.grad(y[0, QUERY[0], QUERY[1]].sum(), x)
    return gradient[0].abs().sum(-1)


def draw(path: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(11, 4.9), layout="constrained")
    image = landscape(PIXELS)
    upper, lower = figure.subplots(2, 5)
    routes = NAMED_ROUTES["cross"]
    patch = PIXELS / SIZE
    upper[0].imshow(image)
    upper[0].set_title("an image", fontsize=10)
    for axes, name, order in zip(upper[1:], routes, visiting_order(), strict=True):
        axes.imshow(image, alpha=0.45)
        x, y = (order % SIZE + 0.5) * patch, (order // SIZE + 0.5) * patch
        axes.plot(x, y, color="#333333", linewidth=1, zorder=1)
        axes.scatter(x, y, c=range(len(order)), cmap="plasma", s=34, zorder=2)
        axes.plot(x[0], y[0], "o", markersize=11, markerfacecolor="none", markeredgecolor="black", zorder=3)
        axes.set_title(name.replace("_", ", "), fontsize=10)
    seen = [seen_from_query((route,)) for route in routes]
    total = seen_from_query(routes)
    titles = ["★ sees all in the sum", *(f"along {name.replace('_', ', ')}" for name in routes)]
    for axes, title, field in zip(lower, titles, [total, *seen], strict=True):
        axes.imshow(field.numpy(), cmap="magma", vmin=0)
        axes.plot(QUERY[1], QUERY[0], "*", color="tab:cyan", markersize=13)
        axes.set_title(title, fontsize=10)
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/assets/routes.png"))
    draw(parser.parse_args().out)
    print(f"vmamba {vmamba.__version__}: {parser.parse_args().out}")
