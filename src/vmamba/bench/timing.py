"""Timing of functions against each other.

Absolute times are unreliable: a machine's speed drifts, and other processes share it. So functions run in
turns in one process, and each round gives a ratio; the result is the median of the ratios, with quartiles.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vmamba.errors import UserError

SHORTEST = 0.2
"""Least seconds of one measurement: a faster function is called several times."""


class BenchError(UserError, RuntimeError):
    """The code to be measured cannot run, or computes a wrong result."""


@dataclass(frozen=True)
class Ratio:
    """The speed of the first of two functions over that of the other, over the rounds.

    Attributes:
        median: The median.
        low: The first quartile.
        high: The third quartile.
    """

    median: float
    low: float
    high: float


def interleaved(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time functions in turns; every second round runs them in the opposite order.

    Args:
        functions: Functions by name. Each is called at least twice before the first round, to warm up.
        rounds: At least 1.
        synchronize: Waits until the device has finished.

    Returns:
        The seconds of one call in each round, by name.
    """

    def measure(name: str, times: int) -> float:
        if times > 1:  # one untimed call first: the caches still hold the previous function's data
            functions[name]()
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            functions[name]()
        synchronize()
        return (time.perf_counter() - start) / times

    times = {}
    for name in functions:
        measure(name, 1)
        times[name] = max(1, math.ceil(SHORTEST / measure(name, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: -1 if i % 2 else 1]:
            seconds[name].append(measure(name, times[name]))
    return seconds


def ratio(first: Sequence[float], other: Sequence[float]) -> Ratio:
    """The speed of the first function over that of the other.

    Args:
        first: Seconds of the first in each round.
        other: Seconds of the other in the same rounds.
    """
    ratios = [b / a for a, b in zip(first, other, strict=True)]
    if len(ratios) == 1:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(statistics.median(ratios), low, high)


def synchronizer(device: str) -> Callable[[], None]:
    """A function that waits until the device has finished; on a CPU there is nothing to wait for.

    Args:
        device: As PyTorch names it.
    """
    return (lambda: None) if device == "cpu" else partial(torch.accelerator.synchronize, device)
