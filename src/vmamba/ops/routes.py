"""The routes along which the 2D selective scan reads an image: a table, name → order of positions.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes.

A new route is a line of `_TABLE`, or a call of `register_route` from outside of the library. The backends
`reference`, `chunked` and `cpu`, export and torch.func serve it at once; another kernel once its `why_not`
admits it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeGuard
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


def _coordinates(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of every position, (l,) each."""
    # By broadcasting: ONNX has no remainder by a symbolic size.
    row, column = torch.arange(height)[:, None], torch.arange(width)
    return row.expand(height, width).reshape(-1), column.expand(height, width).reshape(-1)


def _snake_row(height: int, width: int) -> Tensor:
    """Every other row backwards, so that each position is a neighbour of the one before."""
    row, column = _coordinates(height, width)
    return row * width + torch.where(row % 2 == 0, column, width - 1 - column)


def _diagonal_down(height: int, width: int) -> Tensor:
    """The diagonals with row + column constant, from the upper left corner; each from its upper end."""
    row, column = _coordinates(height, width)
    return ((row + column) * height + row).argsort()


def _diagonal_up(height: int, width: int) -> Tensor:
    """`_diagonal_down` upside down: from the lower left corner."""
    upside_down = torch.arange(height * width).view(height, width).flip(0).reshape(-1)
    return upside_down[_diagonal_down(height, width)]


def _window_row(height: int, width: int, high: int, wide: int) -> Tensor:
    """Window by window of high × wide positions, row by row in each and of them; cut off at the edges."""
    row, column = _coordinates(height, width)
    of_row = row // high * width + column // wide  # places of windows, with gaps
    return (of_row * (high * wide) + row % high * wide + column % wide).argsort()


def _atrous_row(height: int, width: int, high: int, wide: int) -> Tensor:
    """Every high-th row and wide-th column, row by row; then the same from each other first position."""
    row, column = _coordinates(height, width)
    first = row % high * wide + column % wide
    return (first * (height * width) + row // high * width + column // wide).argsort()


def _turned(positions: Tensor, height: int, width: int) -> Tensor:
    """Positions of an image of width × height as those of its transpose."""
    return _column(height, width, positions.device)[positions]


def _kept_unless_traced(order: Callable[[int, int], Tensor], kept: Callable[[int, int], Tensor]) -> _OnDevice:
    """An order that `kept` computes once for a size, except where a tensor is valid in a trace alone."""

    def on_device(height: int, width: int, device: torch.device | None) -> Tensor:
        traced = torch.compiler.is_compiling() or is_transformed(())
        return (order if traced else kept)(height, width).to(device)

    return on_device


def _cached(order: Callable[[int, int], Tensor]) -> _OnDevice:
    return _kept_unless_traced(order, lru_cache(maxsize=32)(order))


def _reversed(order: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    return lambda height, width: order(height, width).flip(0)


def _columns(order: Callable[[int, int], Tensor]) -> Callable[[int, int], Tensor]:
    """The order by columns that belongs to one by rows."""
    return lambda height, width: _turned(order(width, height), height, width)


_TABLE: dict[str, _OnDevice] = {
    "row": _row,
    "column": _column,
    "row_reversed": lambda height, width, device: _row(height, width, device).flip(0),
    "column_reversed": lambda height, width, device: _column(height, width, device).flip(0),
    "snake_row": _cached(_snake_row),
    "snake_column": _cached(_columns(_snake_row)),
    "snake_row_reversed": _cached(_reversed(_snake_row)),
    "snake_column_reversed": _cached(_reversed(_columns(_snake_row))),
    "diagonal_down": _cached(_diagonal_down),
    "diagonal_up": _cached(_diagonal_up),
    "diagonal_down_reversed": _cached(_reversed(_diagonal_down)),
    "diagonal_up_reversed": _cached(_reversed(_diagonal_up)),
}
"""A built-in route's place in the table is its code in the operator's schema, so new ones go to the end."""

_NAME_OF = dict(enumerate(_TABLE))
"""The name of each route by its code."""

_FIRST_REGISTERED = 1000
"""Codes from here on are of registered routes, below it of built-in ones."""

_FIRST_SIZED = 2**40
"""Codes from here on are of the routes of `SIZED_ROUTES`: they hold the size."""

LARGEST_SIZE = 2**12
"""The longest side of a window, and the largest step of an atrous route."""

ROUTES = tuple(_TABLE)
"""The built-in routes."""

CROSS = ("row", "column", "row_reversed", "column_reversed")
"""The first of the table, those of the paper's Cross-Scan Module: all whose codes the kernels know."""

_SIZED: dict[str, Callable[[int, int, int, int], Tensor]] = {"window": _window_row, "atrous": _atrous_row}
"""(height, width, high, wide) → the order by rows. A place here is part of a code: new ones go to the end."""

SIZED_ROUTES = tuple(f"{pattern}_{route}" for pattern in _SIZED for route in CROSS)
"""The built-in routes with a size: "window_row:7" reads windows of 7×7 positions, "window_row:4x6" of 4×6
(height x width), one after another; "atrous_row:2" every second row and column, four times."""

GIVEN = -1
"""The code of a route that is given as a permutation: the next row of the operator's `orders`."""

NAMED_ROUTES = {
    "cross": CROSS,
    "unidirectional": ("row",) * 4,
    "bidirectional": ("row", "row", "row_reversed", "row_reversed"),
    "snake": ("snake_row", "snake_column", "snake_row_reversed", "snake_column_reversed"),
    "diagonal": ("diagonal_down", "diagonal_up", "diagonal_down_reversed", "diagonal_up_reversed"),
}
"""Sets of routes with a name; "cross" is the paper's Cross-Scan Module, in the order of the weights. Beside
them "window:7" and "atrous:2", of any size, are the four routes of `SIZED_ROUTES` with that size."""

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
    pattern = name.partition(":")[0]
    if name in _TABLE or name in NAMED_ROUTES or pattern in (*_SIZED, *SIZED_ROUTES):
        raise ValueError(f"name: {name!r} is a route or a set of routes already; choose another name")
    code = _FIRST_REGISTERED + crc32(name.encode())
    if code in _NAME_OF:
        raise ValueError(f"name: {name!r} has the same code as {_NAME_OF[code]!r}; choose another name")

    def of_size(height: int, width: int) -> Tensor:
        positions = torch.as_tensor(order(height, width))
        if not torch.compiler.is_compiling():  # there sizes may be symbolic and tensors have no values
            _check_permutation(f"route {name!r} at {height} x {width}", positions, height * width)
        return positions.long()

    _REGISTERED[name], _TABLE[name], _NAME_OF[code] = order, _cached(of_size), name


class _SizedRoute(NamedTuple):
    """A route of `SIZED_ROUTES`: its place there, and the size."""

    place: int
    high: int
    wide: int

    @property
    def code(self) -> int:
        """What the operator's schema has; the same in every process."""
        sizes = (self.high - 1) * LARGEST_SIZE + self.wide - 1
        return _FIRST_SIZED + self.place * LARGEST_SIZE**2 + sizes

    @property
    def name(self) -> str:
        """As the user writes it."""
        size = str(self.high) if self.high == self.wide else f"{self.high}x{self.wide}"
        return f"{SIZED_ROUTES[self.place]}:{size}"

    def order(self, height: int, width: int) -> Tensor:
        """The positions, (l,)."""
        by_rows = list(_SIZED.values())[self.place // len(CROSS)]
        route = CROSS[self.place % len(CROSS)]
        if route.startswith("column"):
            order = _columns(lambda h, w: by_rows(h, w, self.wide, self.high))(height, width)
        else:
            order = by_rows(height, width, self.high, self.wide)
        return order.flip(0) if route.endswith("reversed") else order


def _sized_of(code: int) -> _SizedRoute | None:
    """The route with a size that has this code, or None."""
    place, sizes = divmod(code - _FIRST_SIZED, LARGEST_SIZE**2)
    if not 0 <= place < len(SIZED_ROUTES):
        return None
    return _SizedRoute(place, sizes // LARGEST_SIZE + 1, sizes % LARGEST_SIZE + 1)


_kept_order = lru_cache(maxsize=128)(_SizedRoute.order)


def _order_on_device(code: int) -> _OnDevice:
    """The order of a route by its code, which `check_codes` knows."""
    sized = _sized_of(code)
    if sized is None:
        return _TABLE[_NAME_OF[code]]
    return _kept_unless_traced(sized.order, partial(_kept_order, sized))


def _parse_size(route: str, size: str) -> tuple[int, int]:
    """(high, wide) of "7" or "4x6"."""
    sides = size.split("x")
    # isascii: int() reads digits of other scripts too, and isdecimal() lets them pass
    whole = len(sides) <= 2 and all(side.isascii() and side.isdecimal() for side in sides)
    if not whole or not all(1 <= int(side) <= LARGEST_SIZE for side in sides):
        raise ValueError(
            f"routes: {route!r} takes a size of 1 to {LARGEST_SIZE} positions, as in '{route}:7' or "
            f"'{route}:4x6' (height x width), got {size!r}"
        )
    return int(sides[0]), int(sides[-1])


def _code_of(route: str) -> int:
    """The code of one route by name."""
    if route in _TABLE:
        return next(code for code, name in _NAME_OF.items() if name == route)
    pattern, _, size = route.partition(":")
    if pattern in SIZED_ROUTES:
        return _SizedRoute(SIZED_ROUTES.index(pattern), *_parse_size(pattern, size)).code
    sets = (*NAMED_ROUTES, *(f"{name}:7" for name in _SIZED))
    hint = f" ({route!r} is a set: give it alone)" if route in sets or pattern in _SIZED else ""
    expected = (*map(repr, _TABLE), *(f"'{name}:7'" for name in SIZED_ROUTES))
    raise ValueError(f"routes: unknown route {route!r}{hint}; expected {', '.join(expected)}")


def routes_of_set(name: str) -> tuple[str, ...]:
    """The routes of a set by its name: "cross", "window:7".

    Raises:
        ValueError: There is no such set, or its size is none.
    """
    if name in NAMED_ROUTES:
        return NAMED_ROUTES[name]
    pattern, _, size = name.partition(":")
    if pattern in _SIZED:
        _parse_size(pattern, size)
        return tuple(f"{pattern}_{route}:{size}" for route in CROSS)
    expected = (*map(repr, NAMED_ROUTES), *(f"'{pattern}:7'" for pattern in _SIZED))
    raise ValueError(
        f"routes: unknown name {name!r}; expected one of {', '.join(expected)}, "
        f"or a tuple of {', '.join(map(repr, _TABLE))}; models and VSSBlock also take 'cascade'"
    )


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
        routes: A set's name ("cross", "window:7"), or a sequence of names of `ROUTES`, of `SIZED_ROUTES` with
            their sizes, and of registered routes.

    Raises:
        ValueError: A name is unknown, a size is none, or there is no route.
    """
    if isinstance(routes, str):
        routes = routes_of_set(routes)
    if not isinstance(routes, Sequence) or not all(isinstance(route, str) for route in routes):
        raise ValueError(
            f"routes: expected the name of a set or a sequence of routes' names, got {routes!r}; a "
            "permutation gets a name by vmamba.ops.register_route"
        )
    if not routes:
        raise ValueError("routes: expected at least one route, got none")
    return [_code_of(route) for route in routes]


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
    if not codes or not all(code == GIVEN or code in _NAME_OF or _sized_of(code) for code in codes):
        known = ", ".join(f"{code} ({name})" for code, name in _NAME_OF.items())
        raise ValueError(
            f"routes: expected codes among {known}, or {GIVEN} for a permutation in orders; got "
            f"{list(codes)}. Codes from {_FIRST_REGISTERED} on are of routes that register_route makes known "
            "in a process"
        )


def names_of(codes: Sequence[int]) -> tuple[str, ...]:
    """The names of routes, by their codes."""
    sized = [_sized_of(code) for code in codes]
    return tuple(
        route.name if route else "a permutation" if code == GIVEN else _NAME_OF[code]
        for code, route in zip(codes, sized, strict=True)
    )


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
        [next(given) if code == GIVEN else _order_on_device(code)(height, width, device) for code in codes]
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
