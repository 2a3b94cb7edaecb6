"""Routes: built-in, registered, and given as permutations, in `cross_scan` and in the operator."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scans import given as tensors_of
from scans import operands, value_and_gradients
from vmamba.ops import (
    ROUTES,
    cross_merge,
    cross_scan,
    decomposition,
    register_route,
    selective_scan_2d,
    use_backend,
)
from vmamba.ops import routes as routes_module
from vmamba.ops.operands import Operands
from vmamba.ops.routes import parse_routes

IMAGE = torch.tensor([[[0.0], [1.0], [2.0]], [[3.0], [4.0], [5.0]]])[None]  # (1, 2, 3, 1)
VISITS = {
    "row": [0, 1, 2, 3, 4, 5],
    "column": [0, 3, 1, 4, 2, 5],
    "row_reversed": [5, 4, 3, 2, 1, 0],
    "column_reversed": [5, 2, 4, 1, 3, 0],
    "snake_row": [0, 1, 2, 5, 4, 3],
    "snake_column": [0, 3, 4, 1, 2, 5],
    "snake_row_reversed": [3, 4, 5, 2, 1, 0],
    "snake_column_reversed": [5, 2, 1, 4, 3, 0],
    "diagonal_down": [0, 1, 3, 2, 4, 5],
    "diagonal_up": [3, 4, 0, 5, 1, 2],
    "diagonal_down_reversed": [5, 4, 2, 3, 1, 0],
    "diagonal_up_reversed": [2, 1, 5, 0, 4, 3],
}
some_routes = st.lists(st.sampled_from(ROUTES), min_size=1, max_size=5).map(tuple)
size = st.integers(1, 7)


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_visits_the_image_in_its_order(route: str) -> None:
    assert cross_scan(IMAGE, (route,))[0, 0, :, 0].tolist() == VISITS[route]


def test_cross_is_in_the_order_of_the_weights() -> None:
    expected = [VISITS[name] for name in ("row", "column", "row_reversed", "column_reversed")]
    assert cross_scan(IMAGE)[0, :, :, 0].tolist() == expected


def test_a_new_line_of_the_table_is_one_route_more() -> None:
    """And nothing else: "cross" keeps its four, and what a kernel can read stays as it is."""
    end = '}\n"""A built-in route\'s place in the table'
    source = inspect.getsource(routes_module)
    assert source.count(end) == 1
    changed = ModuleType("routes")
    exec(source.replace(end, f'    "line": _row,\n{end}'), changed.__dict__)
    assert changed.ROUTES[-1] == "line"
    assert changed.NAMED_ROUTES == routes_module.NAMED_ROUTES
    assert changed.ROUTES[:-1] == routes_module.ROUTES
    assert tuple(VISITS)[:4] == changed.CROSS
    order = changed.cross_scan(IMAGE, ("line", "column"))[0, :, :, 0].tolist()
    assert order == [VISITS["row"], VISITS["column"]]


@pytest.mark.parametrize(
    ("name", "routes"),
    [("unidirectional", ("row",) * 4), ("bidirectional", ("row", "row", "row_reversed", "row_reversed"))],
)
def test_named_routes(name: str, routes: tuple[str, ...]) -> None:
    assert torch.equal(cross_scan(IMAGE, name), cross_scan(IMAGE, routes))


@given(size, size, some_routes)
def test_merge_is_the_adjoint_of_scan(height: int, width: int, routes: tuple[str, ...]) -> None:
    x = torch.randn(2, height, width, 3, dtype=torch.float64)
    ys = torch.randn(2, len(routes), height * width, 3, dtype=torch.float64)
    torch.testing.assert_close(
        (cross_scan(x, routes) * ys).sum(), (x * cross_merge(ys, (height, width), routes)).sum()
    )


@given(size, size, some_routes)
def test_merge_puts_back_what_scan_took(height: int, width: int, routes: tuple[str, ...]) -> None:
    x = torch.randn(2, height, width, 3, dtype=torch.float64)
    torch.testing.assert_close(cross_merge(cross_scan(x, routes), (height, width), routes), len(routes) * x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_scan(torch.zeros(2, 3, 4)), r"x: expected \(b, h, w, d\)"),
        (lambda: cross_scan(IMAGE, "spiral"), "unknown name 'spiral'"),
        (lambda: cross_scan(IMAGE, ("row", "up")), "unknown route 'up'"),
        (lambda: cross_scan(IMAGE, ()), "at least one route"),
        (lambda: cross_merge(torch.zeros(1, 4, 5, 1), (2, 3)), r"ys: expected \(b, 4, 6, d\)"),
    ],
)
def test_bad_calls(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@st.composite
def drawn_routes(draw: Any) -> tuple[int, int, list[Any]]:
    """Height, width, and routes: permutations and names, mixed."""
    height, width = draw(size), draw(size)
    permutation = st.permutations(range(height * width)).map(torch.tensor)
    routes = draw(st.lists(st.one_of(permutation, st.sampled_from(ROUTES)), min_size=1, max_size=4))
    return height, width, routes


def call_of(height: int, width: int, routes: Any, **options: Any) -> dict[str, Any]:
    return operands(2, height, width, 3, 2, 2, ("row",) * len(routes), **options) | {"routes": routes}


@given(drawn_routes())
def test_merge_is_the_adjoint_of_scan_along_permutations(drawn: tuple[int, int, list[Any]]) -> None:
    height, width, routes = drawn
    x = torch.randn(2, height, width, 3, dtype=torch.float64)
    ys = torch.randn(2, len(routes), height * width, 3, dtype=torch.float64)
    torch.testing.assert_close(
        (cross_scan(x, routes) * ys).sum(), (x * cross_merge(ys, (height, width), routes)).sum()
    )


@given(drawn_routes())
def test_along_permutations_as_the_reference(drawn: tuple[int, int, list[Any]]) -> None:
    """Value and gradients of `chunked` and of the decomposition."""
    call = call_of(*drawn)
    grad_y = torch.randn_like(call["x"])
    expected = value_and_gradients(call, grad_y, backend="reference")
    for name, t in value_and_gradients(call, grad_y, backend="chunked").items():
        torch.testing.assert_close(t, expected[name], rtol=1e-12, atol=1e-12)
    codes, orders = parse_routes(call["routes"], call["x"].device)
    tensors = [call[name] for name in ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")]
    y, _ = decomposition.scan(Operands(*tensors, True, codes, None, orders))
    torch.testing.assert_close(y, expected["y"], rtol=1e-12, atol=1e-12)


@given(drawn_routes(), st.randoms(use_true_random=False))
def test_permuting_the_image_is_permuting_the_route(drawn: tuple[int, int, list[Any]], random: Any) -> None:
    """The image moved by p and read along p⁻¹(route) gives the result moved by p."""
    height, width, routes = drawn
    call = call_of(height, width, routes, requires_grad=False)
    moved_to = list(range(height * width))  # position i of the new image is moved_to[i] of the old
    random.shuffle(moved_to)
    p = torch.tensor(moved_to)

    def moved(t: Tensor) -> Tensor:
        return t.flatten(1, 2)[:, p].unflatten(1, (height, width))

    positions = torch.arange(height * width).view(1, height, width, 1)
    orders = cross_scan(positions, routes)[0, :, :, 0]
    other = call | {name: moved(call[name]) for name in ("x", "delta", "B", "C")}
    other["routes"] = p.argsort()[orders]
    y = selective_scan_2d(**call, backend="chunked")
    torch.testing.assert_close(
        selective_scan_2d(**other, backend="chunked"), moved(y), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_permutation_of_a_built_in_route_is_that_route(backend: str) -> None:
    call = operands(height=3, width=5)
    positions = torch.arange(15).view(1, 3, 5, 1)
    orders = cross_scan(positions, "cross")[0, :, :, 0]
    grad_y = torch.randn_like(call["x"])
    expected = value_and_gradients(call, grad_y, backend=backend)
    for routes in (
        orders,
        orders.int(),
        list(orders),
        orders.tolist(),
        ["row", *orders[1:3], "column_reversed"],
    ):
        actual = value_and_gradients(call | {"routes": routes}, grad_y, backend=backend)
        for name, t in expected.items():
            assert torch.equal(actual[name], t)
    one = call_of(3, 5, ("column",), requires_grad=False)
    expected_of_one = selective_scan_2d(**one, backend=backend)
    assert torch.equal(selective_scan_2d(**one | {"routes": orders[1]}, backend=backend), expected_of_one)


def diagonal(height: int, width: int) -> Tensor:
    """Along the diagonals, from the upper left to the lower right corner."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((rows + columns) * height * width + rows).flatten().argsort()


register_route("diagonal of the tests", diagonal)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # PyTorch's own, in forward mode
def test_a_registered_route() -> None:
    """In every backend that serves any route, in both forms, under a transform, and exported."""
    name, order = "diagonal of the tests", diagonal(3, 5)
    assert order.tolist() == [0, 1, 5, 2, 6, 10, 3, 7, 11, 4, 8, 12, 9, 13, 14]
    call = call_of(3, 5, ("row", name))
    given_order = call | {"routes": ("row", order)}
    grad_y = torch.randn_like(call["x"])
    for backend in ("reference", "chunked"):
        actual, expected = (value_and_gradients(c, grad_y, backend=backend) for c in (call, given_order))
        for key, t in expected.items():
            assert torch.equal(actual[key], t)
    x = call["x"].detach()
    assert torch.equal(cross_scan(x, (name,)), cross_scan(x, (order,)))
    ys = torch.randn(2, 1, 15, 4)
    assert torch.equal(cross_merge(ys, (3, 5), (name,)), cross_merge(ys, (3, 5), (order,)))

    def f(x: Tensor, routes: Any) -> Tensor:
        return selective_scan_2d(**call | {"x": x, "routes": routes}, backend="chunked").square().sum()

    for derivative in (
        torch.func.grad(f),
        lambda x, routes: torch.func.jvp(lambda x: f(x, routes), (x,), (x,))[1],
    ):
        torch.testing.assert_close(derivative(x, call["routes"]), derivative(x, given_order["routes"]))
    register_route(name, diagonal)  # the same again is no mistake


class Layer(torch.nn.Module):
    """A scan along a registered route, as plain aten."""

    def __init__(self, call: dict[str, Any]) -> None:
        super().__init__()
        self.call = {
            key: t.detach() for key, t in tensors_of(call).items() if key not in ("x", "delta", "B", "C")
        }
        self.codes, _ = parse_routes(call["routes"], torch.device("cpu"))

    def forward(self, x: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
        A, D, bias, weight = (self.call[key] for key in ("A", "D", "delta_bias", "delta_weight"))
        return decomposition.scan(Operands(x, delta, A, B, C, D, bias, weight, True, self.codes))[0]


_SAVE = """
import sys, torch
from vmamba.ops import register_route
from vmamba.ops.routes import route_codes

for name in ("upwards of the tests", "backwards of the tests"):
    register_route(name, lambda height, width: range(height * width))


class Scan(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.routes = route_codes(("row", "backwards of the tests"))

    def forward(self, x, delta, A, B, C):
        scan = torch.ops.vmamba.selective_scan_2d
        return scan(x, delta, A, B, C, None, None, None, True, self.routes, None, None, None)[0]


torch.jit.script(Scan()).save(sys.argv[1])
"""


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_saved_model_finds_its_route_in_another_process(tmp_path: Path) -> None:
    """Which has registered other routes, and in another order."""
    path, script = tmp_path / "scan.pt", tmp_path / "save.py"
    script.write_text(_SAVE)
    subprocess.run([sys.executable, "-W", "ignore", script, path], check=True)
    scan = torch.jit.load(path)
    call = call_of(2, 3, ("row", "row"), requires_grad=False)
    x, A, B, C = (call[name] for name in ("x", "A", "B", "C"))
    inputs = (x, torch.randn(*x.shape[:3], 2, x.shape[3]), A, B, C)
    with pytest.raises(RuntimeError, match="expected codes among"):
        scan(*inputs)
    register_route("backwards of the tests", lambda height, width: range(height * width)[::-1])
    register_route("upwards of the tests", lambda height, width: range(height * width))
    expected = selective_scan_2d(*inputs, routes=("row", "row_reversed"), backend="chunked")
    with use_backend("chunked"):
        torch.testing.assert_close(scan(*inputs), expected)


def test_two_names_of_one_code() -> None:
    """CRC-32 is the same for these two words."""
    register_route("plumless", diagonal)
    with pytest.raises(ValueError, match="'buckeroo' has the same code as 'plumless'"):
        register_route("buckeroo", diagonal)


@pytest.mark.filterwarnings("ignore:.*get_attr. ?[Nn]ode")  # PyTorch 2.7, of its own constants
def test_a_registered_route_is_exported() -> None:
    call = call_of(3, 5, ("row", "diagonal of the tests"), requires_grad=False)
    inputs = tuple(call[name] for name in ("x", "delta", "B", "C"))
    exported = torch.export.export(Layer(call), inputs, strict=False).module()
    torch.testing.assert_close(exported(*inputs), selective_scan_2d(**call, backend="reference"))


def test_permutations_compile_without_a_break() -> None:
    torch.compiler.reset()
    call = call_of(3, 5, ("row", diagonal(3, 5)), requires_grad=False, dtype=torch.float32)
    compiled = torch.compile(lambda **kw: selective_scan_2d(**kw, backend="chunked"), fullgraph=True)
    torch.testing.assert_close(compiled(**call), selective_scan_2d(**call, backend="chunked"))


def test_vmap_over_permutations() -> None:
    call = call_of(3, 5, ("row",), requires_grad=False)
    orders = torch.stack([torch.randperm(15) for _ in range(3)])
    actual = torch.vmap(lambda order: selective_scan_2d(**call | {"routes": order}, backend="chunked"))(
        orders
    )
    for order, y in zip(orders, actual, strict=True):
        assert torch.equal(y, selective_scan_2d(**call | {"routes": order}, backend="chunked"))


def scan_along(routes: Any) -> Callable[[], Any]:
    return lambda: selective_scan_2d(
        **call_of(2, 3, ("row",), requires_grad=False) | {"routes": routes}, backend="chunked"
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (scan_along(torch.arange(5)), ValueError, "routes: expected 1 permutations of 6 positions"),
        (scan_along(torch.tensor([0, 1, 2, 3, 4, 4])), ValueError, "each of the positions 0 to 5 once"),
        (scan_along(torch.tensor([1, 2, 3, 4, 5, 6])), ValueError, "each of the positions 0 to 5 once"),
        (scan_along(torch.arange(6.0)), TypeError, "routes: expected permutations of integers"),
        (scan_along(torch.arange(6) > 2), TypeError, "routes: expected permutations of integers"),
        (scan_along(torch.zeros(1, 6, 1, dtype=torch.int64)), ValueError, "routes: expected names and perm"),
        (scan_along([0, 1, 2, 3, 4, 5]), ValueError, "routes: expected names and permutations"),
        (scan_along([torch.arange(6), torch.arange(5)]), ValueError, "permutations of one length"),
        (scan_along(torch.arange(0).view(0, 6)), ValueError, "at least one route"),
        (lambda: cross_scan(IMAGE, torch.arange(5)), ValueError, "permutations of 2·3 positions, got 5"),
        (lambda: cross_scan(IMAGE, torch.tensor([0, 0, 1, 2, 3, 4])), ValueError, "positions 0 to 5 once"),
        (lambda: register_route("row", diagonal), ValueError, "name: 'row' is a route"),
        (lambda: register_route("cross", diagonal), ValueError, "name: 'cross' is a route"),
        (
            lambda: register_route(
                "diagonal of the tests", lambda height, width: torch.arange(height * width)
            ),
            ValueError,
            "is a route or a set of routes already",
        ),
    ],
)
def test_bad_permutations_and_names(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (lambda height, width: [0] * (height * width), "route 'wrong 0' at 2 x 3: expected each of the"),
        (lambda height, width: range(width), "route 'wrong 1' at 2 x 3: expected 6 integers"),
        (
            lambda height, width: torch.arange(6.0),
            "route 'wrong 2' at 2 x 3: expected 6 integers, got torch.float",
        ),
    ],
)
def test_a_registered_route_that_is_no_permutation(order: Any, message: str) -> None:
    name = message.split("'")[1]
    register_route(name, order)
    with pytest.raises(ValueError, match=message):
        scan_along((name,))()
    call = call_of(2, 3, (name,), requires_grad=False)
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda x: selective_scan_2d(**call | {"x": x}).sum())(call["x"])


@pytest.mark.parametrize("routes", [torch.tensor([0, 1, 2, 3, 4, 4]), torch.arange(5)])
def test_a_transform_checks_permutations_too(routes: Tensor) -> None:
    call = call_of(2, 3, ("row",), requires_grad=False) | {"routes": routes}
    with pytest.raises(ValueError, match="routes: expected"):
        torch.func.grad(lambda x: selective_scan_2d(**call | {"x": x}).sum())(call["x"])
