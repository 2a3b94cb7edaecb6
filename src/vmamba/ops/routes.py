"""The routes along which the 2D selective scan reads an image: a table, name → order of positions.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes.

A new route is a line of `_TABLE`, or a call of `register_route` from outside of the library. The backends
`reference` and `chunked`, export and torch.func serve it at once; a kernel once its `why_not` admits it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeGuard
from zlib import crc32

import torch
from torch import Tensor

from vmamba._torch_private import is_transformed

Order = Callable[[int, int], Tensor | Sequence[int]]
"""(height, width) → the flat image positions (row·w + column) in the order of the route, each once."""
Routes = str | Sequence[str | Tensor | Sequence[int]] | Tensor
"""The type of a `routes=` argument, see `vmamba.ops.selective_scan_2d`."""

_OnDevice = Callable[[int, int, torch.device | None], Tensor]


def _row(height: int, width: int, device: torch.device | None) -> Tensor:
    return torch.arange(height * width, device=device)


def _column(height: int, width: int, device: torch.device | None) -> Tensor:
    return _row(height, width, device).view(height, width).t().reshape(-1)


_TABLE: dict[str, _OnDevice] = {
    "row": _row,
    "column": _column,
    "row_reversed": lambda height, width, device: _row(height, width, device).flip(0),
    "column_reversed": lambda height, width, device: _column(height, width, device).flip(0),
}
"""A built-in route's place in the table is its code in the operator's schema, so new ones go to the end."""

_NAME_OF = dict(enumerate(_TABLE))
"""The name of each route by its code."""

_FIRST_REGISTERED = 1000
"""Codes from here on are of registered routes, below it of built-in ones."""

ROUTES = tuple(_TABLE)
"""The built-in routes."""

CROSS = ("row", "column", "row_reversed", "column_reversed")
"""The first of the table, those of the paper's Cross-Scan Module: all whose codes the kernels know."""

GIVEN = -1
"""The code of a route that is given as a permutation: the next row of the operator's `orders`."""

NAMED_ROUTES = {
    "cross": CROSS,
    "unidirectional": ("row",) * 4,
    "bidirectional": ("row", "row", "row_reversed", "row_reversed"),
}
"""Sets of routes with a name; "cross" is the paper's Cross-Scan Module, in the order of the weights."""

_REGISTERED: dict[str, Order] = {}


def register_route(name: str, order: Order) -> None:
    """Give a route a name, under which `routes=` takes it from then on.

    A model that is saved as TorchScript keeps a code that follows from the name alone: register the same
    names, in any order, before running it in another process.

    Args:
        name: A new one.
        order: (height, width) → the flat image positions row·width + column, each once, in the order of the
            route: a tensor (h·w,) or a sequence of integers. Called once for each size of image.

    Raises:
        ValueError: The name stands for a route or a set of routes already, or has the code of another name.
    """
    if _REGISTERED.get(name) is order:
        return
    if name in _TABLE or name in NAMED_ROUTES:
        raise ValueError(f"name: {name!r} is a route or a set of routes already; choose another name")
    code = _FIRST_REGISTERED + crc32(name.encode())
    if code in _NAME_OF:
        raise ValueError(f"name: {name!r} has the same code as {_NAME_OF[code]!r}; choose another name")

    def of_size(height: int, width: int) -> Tensor:
        positions = torch.as_tensor(order(height, width))
        if not torch.compiler.is_compiling():  # there sizes may be symbolic and tensors have no values
            _check_permutation(f"route {name!r} at {height} x {width}", positions, height * width)
        return positions.long()

    kept = lru_cache(maxsize=32)(of_size)

    def on_device(height: int, width: int, device: torch.device | None) -> Tensor:
        # A tensor made inside a transform or a trace must not be cached: it is only valid there.
        traced = torch.compiler.is_compiling() or is_transformed(())
        return (of_size if traced else kept)(height, width).to(device)

    _REGISTERED[name], _TABLE[name], _NAME_OF[code] = order, on_device, name


def _check_permutation(what: str, positions: Tensor, length: int) -> None:
    if not _is_integral(positions) or positions.shape != (length,):
        raise ValueError(
            f"{what}: expected {length} integers, got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    check_orders(positions[None], what)


def check_orders(orders: Tensor, what: str = "routes") -> None:
    """Raise ValueError if a row of (k, l) is not a permutation of 0 … l - 1. This synchronises with a GPU."""
    expected = torch.arange(orders.shape[1], device=orders.device)
    wrong = (orders.sort(1).values != expected).any(1)
    if wrong.any():
        raise ValueError(
            f"{what}: expected each of the positions 0 to {orders.shape[1] - 1} once, but some are missing "
            f"or come twice in {[i for i, w in enumerate(wrong) if w]} of the permutations given"
        )


def _is_integral(t: Tensor) -> bool:
    return not (t.dtype.is_floating_point or t.dtype.is_complex or t.dtype == torch.bool)


def _is_names(routes: Any) -> TypeGuard[Sequence[str]]:
    return all(isinstance(route, str) for route in routes)


def route_codes(routes: str | Sequence[str]) -> list[int]:
    """The codes of routes by name, as the operator's schema has them.

    Args:
        routes: A name of `NAMED_ROUTES`, or a sequence of names of `ROUTES` and of registered routes.

    Raises:
        ValueError: A name is unknown, or there is none.
    """
    if isinstance(routes, str):
        if routes not in NAMED_ROUTES:
            raise ValueError(
                f"routes: unknown name {routes!r}; expected one of {', '.join(map(repr, NAMED_ROUTES))}, "
                f"or a tuple of {', '.join(map(repr, _TABLE))}"
            )
        routes = NAMED_ROUTES[routes]
    if not routes:
        raise ValueError("routes: expected at least one route, got none")
    codes = {name: code for code, name in _NAME_OF.items()}
    for route in routes:
        if route not in codes:
            raise ValueError(f"routes: unknown route {route!r}; expected {', '.join(map(repr, codes))}")
    return [codes[route] for route in routes]


def parse_routes(routes: Routes, device: torch.device) -> tuple[list[int], Tensor | None]:
    """Convert a `routes=` argument to the `routes` and `orders` of the operator's schema.

    Returns:
        A code for each route, and the permutations among them, (their number, l) int64 on `device`, or None.

    Raises:
        TypeError: A permutation does not hold integers.
        ValueError: A name is unknown, there is no route, or the permutations differ in length.
    """
    if isinstance(routes, str):
        return route_codes(routes), None
    if isinstance(routes, Tensor):
        routes = [routes] if routes.ndim == 1 else list(routes)
    if _is_names(routes):
        return route_codes(routes), None
    codes: list[int] = []
    orders: list[Tensor] = []
    for route in routes:
        if isinstance(route, str):
            codes += route_codes((route,))
            continue
        order = torch.as_tensor(route, device=device)
        if order.ndim != 1:
            raise ValueError(
                "routes: expected names and permutations of the positions, (l,), each; "
                f"got one of shape {tuple(order.shape)}"
            )
        if not _is_integral(order):
            raise TypeError(f"routes: expected permutations of integers, got {order.dtype}")
        codes.append(GIVEN)
        orders.append(order.long())
    if len({len(order) for order in orders}) > 1:
        raise ValueError(f"routes: expected permutations of one length, got {[len(o) for o in orders]}")
    return codes, torch.stack(orders)


def check_codes(codes: Sequence[int]) -> None:
    """Raise ValueError if there is no code, or one is unknown."""
    if not codes or not all(code == GIVEN or code in _NAME_OF for code in codes):
        known = ", ".join(f"{code} ({name})" for code, name in _NAME_OF.items())
        raise ValueError(
            f"routes: expected codes among {known}, or {GIVEN} for a permutation in orders; got "
            f"{list(codes)}. Codes from {_FIRST_REGISTERED} on are of routes that register_route makes known "
            "in a process"
        )


def names_of(codes: Sequence[int]) -> tuple[str, ...]:
    """The names of routes, by their codes."""
    return tuple("a permutation" if code == GIVEN else _NAME_OF[code] for code in codes)


def scan_order(
    codes: Sequence[int],
    height: int,
    width: int,
    device: torch.device | None = None,
    orders: Tensor | None = None,
) -> Tensor:
    """The flat image positions row·w + column in the order in which each route visits them.

    Args:
        codes: Of the routes.
        height: Of the image.
        width: Of the image.
        device: Of the result.
        orders: A row for each code that is `GIVEN`, (their number, l).

    Returns:
        (k, l), int64.
    """
    given = iter(() if orders is None else orders)
    return torch.stack(
        [next(given) if code == GIVEN else _TABLE[_NAME_OF[code]](height, width, device) for code in codes]
    )


def cross_scan(x: Tensor, routes: Routes = "cross") -> Tensor:
    """Unfold an image along every route (the paper's cross-scan).

    Args:
        x: (b, h, w, d).
        routes: As for `selective_scan_2d`.

    Returns:
        (b, k, l, d): `out[:, k, t]` is x at the t-th position that route k visits.

    Raises:
        TypeError: A permutation does not hold integers.
        ValueError: x has not four dimensions, a route is unknown, or a permutation does not hold each of the
            l positions once.
    """
    if x.ndim != 4:
        raise ValueError(f"x: expected (b, h, w, d), got shape {tuple(x.shape)}")
    return x.flatten(1, 2)[:, _order_of(routes, x.shape[1], x.shape[2], x.device)]


def cross_merge(ys: Tensor, size: tuple[int, int], routes: Routes = "cross") -> Tensor:
    """Put every route's sequence back into the image and sum (the adjoint of `cross_scan`).

    Args:
        ys: (b, k, l, d), l in the order of each route.
        size: (h, w) of the image.
        routes: As for `selective_scan_2d`.

    Returns:
        (b, h, w, d).

    Raises:
        TypeError: A permutation does not hold integers.
        ValueError: The shape of ys does not fit `size` and `routes`, a route is unknown, or a permutation
            does not hold each of the l positions once.
    """
    order = _order_of(routes, *size, ys.device)
    if ys.ndim != 4 or ys.shape[1:3] != order.shape:
        raise ValueError(
            f"ys: expected (b, {order.shape[0]}, {order.shape[1]}, d) for size {tuple(size)} and "
            f"{order.shape[0]} routes, got shape {tuple(ys.shape)}"
        )
    merged = ys.new_zeros(ys.shape[0], order.shape[1], ys.shape[3])
    for k in range(order.shape[0]):
        merged = merged.index_add(1, order[k], ys[:, k])
    return merged.unflatten(1, size)


def _order_of(routes: Routes, height: int, width: int, device: torch.device) -> Tensor:
    codes, orders = parse_routes(routes, device)
    if orders is not None:
        if orders.shape[1] != height * width:
            raise ValueError(
                f"routes: expected permutations of {height}·{width} positions, got {orders.shape[1]}"
            )
        check_orders(orders)
    return scan_order(codes, height, width, device, orders)
