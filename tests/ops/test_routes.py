import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmamba.ops import ROUTES, cross_merge, cross_scan

IMAGE = torch.tensor([[[0.0], [1.0], [2.0]], [[3.0], [4.0], [5.0]]])[None]  # (1, 2, 3, 1)
VISITS = {
    "row": [0, 1, 2, 3, 4, 5],
    "column": [0, 3, 1, 4, 2, 5],
    "row_reversed": [5, 4, 3, 2, 1, 0],
    "column_reversed": [5, 2, 4, 1, 3, 0],
}
some_routes = st.lists(st.sampled_from(ROUTES), min_size=1, max_size=5).map(tuple)
size = st.integers(1, 7)


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_visits_the_image_in_its_order(route: str) -> None:
    assert cross_scan(IMAGE, (route,))[0, 0, :, 0].tolist() == VISITS[route]


def test_cross_is_in_the_order_of_the_weights() -> None:
    assert cross_scan(IMAGE)[0, :, :, 0].tolist() == list(VISITS.values())


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
        (lambda: cross_scan(torch.zeros(2, 3, 4)), r"x: expected \(B, H, W, D\)"),
        (lambda: cross_scan(IMAGE, "diagonal"), "unknown name 'diagonal'"),
        (lambda: cross_scan(IMAGE, ("row", "up")), "unknown route 'up'"),
        (lambda: cross_scan(IMAGE, ()), "at least one route"),
        (lambda: cross_merge(torch.zeros(1, 4, 5, 1), (2, 3)), r"ys: expected \(B, 4, 6, D\)"),
    ],
)
def test_bad_calls(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
