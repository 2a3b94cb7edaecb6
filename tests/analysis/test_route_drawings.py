import pytest
import torch
from torch import nn

from vmamba import VMamba
from vmamba.analysis.routes import RouteError, draw, routes_in, routes_of
from vmamba.ops.routes import register_route

GRID = torch.arange(6).view(2, 3)


def orders(routes) -> list[tuple[str, list[list[int]]]]:
    return [(route.name, [path.tolist() for path in route.paths]) for route in routes]


def test_the_order_of_each_route() -> None:
    assert orders(routes_of("cross", (2, 3))) == [
        ("row", [[0, 1, 2, 3, 4, 5]]),
        ("column", [[0, 3, 1, 4, 2, 5]]),
        ("row_reversed", [[5, 4, 3, 2, 1, 0]]),
        ("column_reversed", [[5, 2, 4, 1, 3, 0]]),
    ]
    assert orders(routes_of("cascade", (2, 3))) == [
        ("each row", [[0, 1, 2], [3, 4, 5]]),
        ("each row, reversed", [[2, 1, 0], [5, 4, 3]]),
        ("each column", [[0, 3], [1, 4], [2, 5]]),
        ("each column, reversed", [[3, 0], [4, 1], [5, 2]]),
    ]
    given = routes_of(["row", torch.tensor([5, 0, 4, 1, 3, 2])], (2, 3))
    assert orders(given)[1] == ("a permutation", [[5, 0, 4, 1, 3, 2]])


def test_a_registered_route() -> None:
    register_route("inwards", _inwards)
    assert orders(routes_of(["inwards"], (2, 3))) == [("inwards", [[0, 5, 1, 4, 2, 3]])]


def _inwards(height: int, width: int) -> torch.Tensor:
    positions = torch.arange(height * width)
    return torch.stack([positions, positions.flip(0)], 1).flatten()[: height * width]


def test_the_routes_of_a_model() -> None:
    model = VMamba(num_classes=0, depths=(1, 1), dims=(8, 8), routes=("column", "row_reversed")).train()
    (routes,) = routes_in(model, (3, 32, 48)).values()
    assert [route.name for route in routes] == ["column", "row_reversed"]
    assert routes[0].size == (4, 6)  # of the last stage
    assert orders(routes) == orders(routes_of(("column", "row_reversed"), (4, 6)))
    assert model.training
    cascade = VMamba(num_classes=0, depths=(1,), dims=(8,), routes="cascade")
    (routes,) = routes_in(cascade, (3, 32, 48)).values()
    assert orders(routes) == orders(routes_of("cascade", (8, 12)))


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ("zigzag", "unknown name 'zigzag'"),
        (["row", "zigzag"], "unknown route 'zigzag'"),
        ([torch.arange(5)], "expected permutations of 2·3 positions, got 5"),
        ([torch.tensor([0, 1, 2, 3, 4, 4])], "some are missing or come twice"),
        ([torch.arange(6.0)], "expected permutations of integers"),
        ([], "expected at least one route"),
    ],
)
def test_what_is_no_route(routes, message: str) -> None:
    with pytest.raises(RouteError, match=message):
        routes_of(routes, (2, 3))


def test_a_model_without_routes() -> None:
    with pytest.raises(RouteError, match="expected one with selective scans, Conv2d has none"):
        routes_in(nn.Conv2d(3, 4, 1), (3, 4, 4))


def test_the_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    sets = {"cross": routes_of("cross", (3, 12)), "rows": routes_of("cascade", (1, 1))[:1]}
    for image in (None, torch.rand(3, 5, 7), torch.rand(1, 5, 7)):
        draw(sets, tmp_path / "routes.png", image)
        assert (tmp_path / "routes.png").read_bytes().startswith(b"\x89PNG")
