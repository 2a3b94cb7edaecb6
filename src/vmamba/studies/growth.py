"""How a cost grows with the size of the image: the exponent of a power law, with its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for a two-sided interval of 95 %, for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Exponent:
    """p in cost ∝ pixels^p: 1 is linear, 2 is quadratic.

    Attributes:
        value: By least squares over the logarithms.
        margin: Half the width of the 95 % interval, from the points' distances to the line; NaN for two
            points, which lie on one.
    """

    value: float
    margin: float

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if math.isnan(self.margin) else f" ± {self.margin:.2f}")


def exponent(pixels: Sequence[float], cost: Sequence[float]) -> Exponent | None:
    """Fit cost = c · pixels^p.

    Args:
        pixels: Of an image.
        cost: Of an image, positive.

    Returns:
        None for fewer than two sizes.
    """
    if len(set(pixels)) < 2:
        return None
    xs, ys = [math.log(p) for p in pixels], [math.log(c) for c in cost]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    freedom = len(xs) - 2
    if freedom == 0:
        return Exponent(slope, math.nan)
    squares = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    t = _T_975[freedom - 1] if freedom <= len(_T_975) else 1.96 + 2.4 / freedom
    return Exponent(slope, t * math.sqrt(squares / freedom / spread))
