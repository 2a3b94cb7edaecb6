"""The exponent of a power law and its interval."""

import math

import pytest

from vmamba.studies.growth import exponent

PIXELS = [float(side**2) for side in (224, 384, 512, 640, 768, 1024)]


@pytest.mark.parametrize("power", [1.0, 2.0, 1.5])
def test_of_a_power_law_it_is_the_power(power: float) -> None:
    fit = exponent(PIXELS, [3e-9 * p**power for p in PIXELS])
    assert fit is not None
    assert fit.value == pytest.approx(power, abs=1e-9)
    assert fit.margin == pytest.approx(0, abs=1e-6)


def test_the_interval_is_that_of_a_textbook() -> None:
    """Slope and 95 % interval of five points, computed by hand: x = 0…4, y = 1, 3, 2, 5, 4."""
    fit = exponent([math.exp(x) for x in range(5)], [math.exp(y) for y in (1, 3, 2, 5, 4)])
    assert fit is not None
    assert fit.value == pytest.approx(0.8)
    assert fit.margin == pytest.approx(3.182 * math.sqrt(3.6 / 3 / 10))
    assert str(fit) == "0.80 ± 1.10"


def test_two_points_have_no_interval_and_one_no_exponent() -> None:
    fit = exponent([1, 4], [1, 2])
    assert str(fit) == "0.50"
    assert exponent([1], [1]) is None
    assert exponent([4, 4], [1, 2]) is None
