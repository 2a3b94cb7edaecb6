import random

import numpy as np
import pytest
import torch

from vmamba.data import draw_seed, seeded


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_draw_is_a_function_of_the_counters() -> None:
    draws = {}
    for counters in [(0, 0), (0, 1), (1, 0), (0, 0, 0)]:
        for purpose in ("order", "augmentation"):
            with seeded(purpose, *counters):
                draws[purpose, counters] = draw()
    for values in zip(*draws.values(), strict=True):
        assert len(set(values)) == len(draws)
    draw()
    with seeded("order", 0, 1):
        assert draw() == draws["order", (0, 1)]


def test_what_comes_after_is_left_alone() -> None:
    def after(block: bool) -> tuple[float, float, float]:
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        draw()
        if block:
            with pytest.raises(ZeroDivisionError), seeded("anything", 1):
                torch.rand(3)[int(random.random()) // 0]
        return draw()

    assert after(True) == after(False)


def test_blocks_within_blocks() -> None:
    with seeded("outer", 0):
        expected = draw(), draw()
    with seeded("inner", 0):
        inner = draw()
    with seeded("outer", 0):
        first = draw()
        with seeded("inner", 0):
            assert draw() == inner
        assert (first, draw()) == expected


def test_seeds_stay_as_they_are() -> None:
    """A checkpoint keeps no random state: with other seeds its run would not go on as it began."""
    assert draw_seed("order", 0, 0) == 8105155533265743171
    assert 0 <= draw_seed("order", 2**40, 7) < 2**63
