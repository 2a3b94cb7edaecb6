import math

import pytest

from vmamba.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Line, chart, ticks


def one(points: list[tuple[float, float]], **change: str) -> Chart:
    drawn = chart("loss", "epoch", [Line("train/loss", 0, "train", points)])
    assert drawn is not None
    return drawn


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.38, 1.19, [0.2, 0.4, 0.6, 0.8, 1, 1.2]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (5e-7, 1e-3, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
        (100_000, 100_000, [90_000, 95_000, 100_000, 105_000, 110_000]),
    ],
)
def test_ticks_enclose_the_range(low: float, high: float, expected: list[float]) -> None:
    assert list(ticks(low, high)) == pytest.approx(expected)


def test_epochs_are_whole_numbers() -> None:
    assert list(ticks(1, 3, whole=True)) == [1, 2, 3]


def test_points_lie_where_their_values_are() -> None:
    drawn = one([(1, 0.0), (2, 0.5), (3, 1.0)])
    (segment,) = drawn.lines[0].segments
    middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    assert segment == [(LEFT, HEIGHT - BOTTOM), pytest.approx(middle), (WIDTH - RIGHT, TOP)]
    assert [label for _, label in drawn.y_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [label for _, label in drawn.x_ticks] == ["1", "2", "3"]


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    (line,) = one([(1, 3.0), (2, math.nan), (3, 1.0), (4, math.inf), (5, 2.0), (6, 2.5)]).lines
    assert [len(segment) for segment in line.segments] == [1, 1, 2]
    assert len(line.markers) == 4
    assert line.summary == "train/loss: 3 at epoch 1, 2.5 at epoch 6; lowest 1 at 3, highest 3 at 1"


def test_a_single_point() -> None:
    drawn = one([(1, 0.25)])
    assert drawn.lines[0].summary == "train/loss: 0.25 at epoch 1"
    assert len(drawn.lines[0].markers) == 1


def test_many_points_are_not_marked() -> None:
    assert one([(x, x) for x in range(200)]).lines[0].markers == []


def test_nothing_to_draw() -> None:
    assert chart("loss", "epoch", [Line("loss", 0, "train", [(1, math.nan)])]) is None
    assert chart("loss", "epoch", []) is None
