"""Routes beyond the paper's: snake, diagonal, window and atrous; and channels split over routes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scans import FAST, operands, value_and_gradients
from scans import given as tensors_of
from vmamba.errors import BackendError
from vmamba.ops import (
    NAMED_ROUTES,
    SIZED_ROUTES,
    backends,
    cross_scan,
    decomposition,
    register_route,
    selective_scan_2d,
)
from vmamba.ops.operands import Operands
from vmamba.ops.routes import check_codes, names_of, parse_routes, route_codes

SETS = ("snake", "diagonal", "window:2", "window:2x3", "atrous:2", "atrous:3x1")
side = st.integers(1, 9)


def orders(routes: Any, height: int, width: int) -> Tensor:
    """(k, h·w)."""
    return cross_scan(torch.arange(height * width).view(1, height, width, 1), routes)[0, :, :, 0]


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ("snake_row", [0, 1, 2, 5, 4, 3, 6, 7, 8]),
        ("snake_column", [0, 3, 6, 7, 4, 1, 2, 5, 8]),
        ("diagonal_down", [0, 1, 3, 2, 4, 6, 5, 7, 8]),
        ("diagonal_up_reversed", [2, 1, 5, 0, 4, 8, 3, 7, 6]),
        ("window_row:2", [0, 1, 3, 4, 2, 5, 6, 7, 8]),
        ("window_column:2x1", [0, 3, 6, 1, 4, 7, 2, 5, 8]),
        ("window_row:1x2", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("atrous_row:2", [0, 2, 6, 8, 1, 7, 3, 5, 4]),
        ("atrous_column_reversed:2", [4, 7, 1, 5, 3, 8, 2, 6, 0]),
    ],
)
def test_the_order_on_nine_positions(route: str, expected: list[int]) -> None:
    assert orders((route,), 3, 3)[0].tolist() == expected


@given(side, side, st.sampled_from(SETS))
def test_each_position_once_and_backwards(height: int, width: int, routes: str) -> None:
    forwards, other, *backwards = orders(routes, height, width)
    assert torch.equal(forwards.sort().values, torch.arange(height * width))
    assert torch.equal(other.sort().values, torch.arange(height * width))
    assert torch.equal(torch.stack(backwards), torch.stack([forwards, other]).flip(1))


@given(side, side)
def test_a_snake_goes_from_neighbour_to_neighbour(height: int, width: int) -> None:
    for order in orders("snake", height, width):
        steps = torch.stack([order // width, order % width]).diff().abs().sum(0)
        assert (steps == 1).all()


@given(side, side, st.integers(0, 3))
def test_a_window_of_the_images_size_is_cross(height: int, width: int, more: int) -> None:
    cross = orders("cross", height, width)
    for routes in (f"window:{height}x{width}", f"window:{max(height, width) + more}", "window:1", "atrous:1"):
        assert torch.equal(orders(routes, height, width), cross)


@given(side, side, st.integers(1, 4), st.integers(1, 4))
def test_a_window_is_left_when_it_is_full(height: int, width: int, high: int, wide: int) -> None:
    for order in orders(f"window:{high}x{wide}", height, width):
        window = (order // width // high) * width + order % width // wide
        changes = int((window.diff() != 0).sum())
        assert changes == len(window.unique()) - 1


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("routes", [*SETS, ("window_row:3", "row", "atrous_column:2")], ids=str)
def test_as_the_reference_on_gathered_input(backend: str, routes: Any) -> None:
    """The scan along each route is the scan along "row" of the input put in the route's order."""
    names = NAMED_ROUTES["cross"] if isinstance(routes, str) else routes
    call = operands(2, 5, 4, 3, 2, 2, ("row",) * len(names))
    grad_y = torch.randn_like(call["x"])
    if backend == "triton":  # it has no such routes, and says so
        with pytest.raises(BackendError, match="it reads along the routes row, column"):
            selective_scan_2d(**call | {"routes": routes}, backend=backend)
        return
    actual = value_and_gradients(call | {"routes": routes}, grad_y, backend=backend)
    y, order = 0, orders(routes, 5, 4)
    for k in range(len(names)):
        of_route = {name: call[name].flatten(1, 2)[:, order[k]] for name in ("x", "delta", "B", "C")}
        gathered = {name: t.unflatten(1, (1, 20)) for name, t in of_route.items()}
        one = {name: t[:, :, :, k : k + 1] for name, t in gathered.items() if name != "x"}
        rest = {name: call[name][k : k + 1] for name in ("A", "D", "delta_bias", "delta_weight")}
        along = selective_scan_2d(gathered["x"], **one, **rest, routes=("row",), backend="reference")
        y = y + along.flatten(1, 2)[:, order[k].argsort()].unflatten(1, (5, 4))
    tensors = tensors_of(call)
    expected = torch.autograd.grad(y, list(tensors.values()), grad_y)
    torch.testing.assert_close(actual.pop("y"), y)
    for (name, gradient), other in zip(actual.items(), expected, strict=True):
        torch.testing.assert_close(gradient, other, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(not backends()[0].available, reason=f"cpu: {backends()[0].reason}")
@pytest.mark.parametrize("n_state", [1, 3])
@pytest.mark.parametrize("routes", [*SETS, "permutations"])
def test_the_compiled_kernel(routes: str, n_state: int) -> None:
    """Over several tiles and saved states, with channels that fill no vector, and mixed types."""
    permutations = torch.stack([torch.randperm(9 * 17) for _ in range(4)])
    call = operands(2, 9, 17, 19, n_state, 5) | {
        "routes": permutations if routes == "permutations" else routes
    }
    call["B"] = call["B"].detach().half().requires_grad_()
    grad_y = torch.randn_like(call["x"])
    expected = value_and_gradients(call, grad_y, backend="chunked")
    for name, t in value_and_gradients(call, grad_y, backend="cpu").items():
        torch.testing.assert_close(t, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_a_backward_with_positions_outside_of_the_image_is_refused() -> None:
    """The backward operator, called by itself, checks what the kernel would write to."""
    call = operands(1, 2, 3, 4, 1, 2, ("row",), requires_grad=False)
    tensors = [call[name] for name in ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")]
    states = torch.zeros(1, 1, 1, 1, 4, dtype=torch.float64)
    wrong = torch.tensor([[0, 1, 2, 3, 4, 60]])
    with pytest.raises(ValueError, match="each of the positions 0 to 5 once"):
        torch.ops.vmamba.selective_scan_2d_backward(
            call["x"], None, *tensors, True, [-1], None, states, "cpu", wrong
        )


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ("window", "'window' takes a size of 1 to 4096 positions, as in 'window:7'"),
        ("window:0", "takes a size of 1 to 4096"),
        ("window:-2", "takes a size of 1 to 4096"),
        ("window:4097", "takes a size of 1 to 4096"),
        ("window:2x2x2", "takes a size of 1 to 4096"),
        ("window:2.5", "takes a size of 1 to 4096"),
        ("atrous:", "'atrous' takes a size"),
        ("snake:2", "unknown name 'snake:2'"),
        ("zigzag", "unknown name 'zigzag'; expected one of .*'snake', 'diagonal', 'window:7', 'atrous:7'"),
        (("row", "snake"), r"unknown route 'snake' \('snake' is a set: give it alone\)"),
        (("window:3",), r"'window:3' is a set: give it alone"),
        (("window_row",), "'window_row' takes a size"),
        (("window_row:x3",), "'window_row' takes a size"),
        (("snake_row:3",), "unknown route 'snake_row:3'"),
    ],
)
def test_bad_names_and_sizes(routes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route_codes(routes)


@pytest.mark.parametrize("name", ["snake", "window", "window:3", "window_row:3", "diagonal_up"])
def test_a_built_in_name_cannot_be_registered(name: str) -> None:
    with pytest.raises(ValueError, match="is a route or a set of routes already"):
        register_route(name, lambda height, width: range(height * width))


@given(st.sampled_from(SIZED_ROUTES), st.integers(1, 4096), st.integers(1, 4096))
def test_a_size_is_in_the_code(route: str, high: int, wide: int) -> None:
    code = route_codes((f"{route}:{high}x{wide}",))
    check_codes(code)
    assert route_codes(names_of(code)) == code


def test_a_code_beyond_the_last_is_unknown() -> None:
    last = route_codes((f"{SIZED_ROUTES[-1]}:4096",))
    with pytest.raises(ValueError, match="expected codes among"):
        check_codes([last[0] + 1])


# --- a part of the channels along each route ---


def split_call(routes: Any, **options: Any) -> dict[str, Any]:
    """x of 8 channels, the other operands of 8 / k."""
    k = len(NAMED_ROUTES["cross"] if isinstance(routes, str) else routes)
    call = operands(2, 3, 5, 8 // k, 2, 3, ("row",) * k, **options) | {"routes": routes}
    x = torch.randn(2, 3, 5, 8, dtype=call["x"].dtype, requires_grad=call["x"].requires_grad)
    return call | {"x": x, "split_channels": True}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("routes", ["cross", ("column", "row_reversed")], ids=str)
def test_parts_of_the_channels_are_scans_of_their_own(backend: str, routes: Any) -> None:
    call = split_call(routes)
    grad_y = torch.randn_like(call["x"])
    actual = value_and_gradients(call, grad_y, backend=backend)
    names = NAMED_ROUTES[routes] if isinstance(routes, str) else routes
    parts = []
    for k, (name, x) in enumerate(zip(names, call["x"].chunk(len(names), -1), strict=True)):
        one = {key: call[key][:, :, :, k : k + 1] for key in ("delta", "B", "C")}
        rest = {key: call[key][k : k + 1] for key in ("A", "D", "delta_bias", "delta_weight")}
        parts.append(selective_scan_2d(x, **one, **rest, routes=(name,), backend="reference"))
    y = torch.cat(parts, -1)
    expected = torch.autograd.grad(y, list(tensors_of(call).values()), grad_y)
    torch.testing.assert_close(actual.pop("y"), y)
    for gradient, other in zip(actual.values(), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_parts_of_the_channels_along_permutations() -> None:
    call = split_call(("row", "column"), requires_grad=False)
    expected = selective_scan_2d(**call)
    torch.testing.assert_close(selective_scan_2d(**call | {"routes": orders(call["routes"], 3, 5)}), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routes": ("row",) * 3}, "a multiple of the 3 routes"),
        ({"x": torch.zeros(2, 3, 5, 12)}, "A?.*: expected .*, got shape"),
        ({"B": torch.zeros(2, 3, 5, 3, 2)}, "B: expected 2 routes in dimension 3"),
        ({"D": torch.zeros(3, 4)}, "D: expected 2 routes in dimension 0"),
    ],
)
def test_channels_that_cannot_be_split(change: dict[str, Any], message: str) -> None:
    call = split_call(("row", "column"), requires_grad=False)
    with pytest.raises(ValueError, match=message):
        selective_scan_2d(**call | change)


def test_the_decomposition_takes_every_route() -> None:
    call = operands(2, 5, 4, 3, 2, 2, requires_grad=False)
    tensors = [call[name] for name in ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")]
    for routes in SETS:
        codes, _ = parse_routes(routes, torch.device("cpu"))
        y, _ = decomposition.scan(Operands(*tensors, True, codes))
        torch.testing.assert_close(y, selective_scan_2d(**call | {"routes": routes}, backend="reference"))
