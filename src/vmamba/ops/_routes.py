"""The routes along which the 2D selective scan reads an image.

B batch, H height, W width, L = H·W, D channels, K routes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUTES = ("row", "column", "row_reversed", "column_reversed")
"""Every route, in the order of its code in the operator's schema."""

NAMED_ROUTES = {
    "cross": ROUTES,
    "unidirectional": ("row",) * 4,
    "bidirectional": ("row", "row", "row_reversed", "row_reversed"),
}
"""Route sets with a name; "cross" is the paper's Cross-Scan Module, in the order of the weights."""


def route_codes(routes: str | Sequence[str]) -> list[int]:
    """Turn route names into the codes of the operator's schema.

    Args:
        routes: A name of `NAMED_ROUTES`, or a sequence of names of `ROUTES`.

    Raises:
        ValueError: A name is unknown, or there is none.
    """
    if isinstance(routes, str):
        if routes not in NAMED_ROUTES:
            raise ValueError(
                f"routes: unknown name {routes!r}; expected one of {', '.join(map(repr, NAMED_ROUTES))}, "
                f"or a tuple of {', '.join(map(repr, ROUTES))}"
            )
        routes = NAMED_ROUTES[routes]
    if not routes:
        raise ValueError("routes: expected at least one route, got none")
    for route in routes:
        if route not in ROUTES:
            raise ValueError(f"routes: unknown route {route!r}; expected {', '.join(map(repr, ROUTES))}")
    return [ROUTES.index(route) for route in routes]


def route_order(code: int, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """The flat image positions (h·W + w) in the order in which a route visits them, (L,) int64."""
    positions = torch.arange(height * width, device=device)
    if code in (1, 3):
        positions = positions.view(height, width).t().reshape(-1)
    return positions.flip(0) if code >= 2 else positions


def scan_order(codes: Sequence[int], height: int, width: int, device: torch.device | None = None) -> Tensor:
    """`route_order` of every route, (K, L)."""
    return torch.stack([route_order(code, height, width, device) for code in codes])


def cross_scan(x: Tensor, routes: str | Sequence[str] = "cross") -> Tensor:
    """Unfold an image along every route (the paper's cross-scan).

    Args:
        x: (B, H, W, D).
        routes: As for `selective_scan_2d`.

    Returns:
        (B, K, L, D): `out[:, k, t]` is x at the t-th position that route k visits.

    Raises:
        ValueError: x has not four dimensions, or a route is unknown.
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected (B, H, W, D), got shape {tuple(x.shape)}")
    _, height, width, _ = x.shape
    return x.flatten(1, 2)[:, scan_order(route_codes(routes), height, width, x.device)]


def cross_merge(ys: Tensor, size: tuple[int, int], routes: str | Sequence[str] = "cross") -> Tensor:
    """Put every route's sequence back into the image and sum (the adjoint of `cross_scan`).

    Args:
        ys: (B, K, L, D), L in the order of each route.
        size: (H, W) of the image.
        routes: As for `selective_scan_2d`.

    Returns:
        (B, H, W, D).

    Raises:
        ValueError: The shape of ys does not fit `size` and `routes`, or a route is unknown.
    """
    codes = route_codes(routes)
    height, width = size
    if ys.ndim != 4 or ys.shape[1:3] != (len(codes), height * width):
        raise ValueError(
            f"ys: expected (B, {len(codes)}, {height * width}, D) for size {tuple(size)} and "
            f"{len(codes)} routes, got shape {tuple(ys.shape)}"
        )
    merged = ys.new_zeros(ys.shape[0], height * width, ys.shape[3])
    for k, code in enumerate(codes):
        merged = merged.index_add(1, route_order(code, height, width, ys.device), ys[:, k])
    return merged.unflatten(1, (height, width))
