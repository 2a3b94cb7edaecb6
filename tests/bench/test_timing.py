"""Timing in turns; no speed is asserted."""

import pytest

from vmamba.bench import timing
from vmamba.bench.timing import Ratio, interleaved, ratio


def test_every_round_runs_all_in_turns() -> None:
    calls: list[str] = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, 3)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert calls[-9:] == [*"abc", *"cba", *"abc"]


def test_a_short_call_is_repeated_behind_one_that_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST", 0.01)
    times = iter(range(10**9))

    def tick() -> None:
        next(times)

    waits: list[None] = []
    (seconds,) = interleaved({"": tick}, 1, lambda: waits.append(None)).values()
    assert 0 < seconds[0] < timing.SHORTEST
    assert len(waits) == 6  # before and after each of two warm-up calls and the measurement
    assert next(times) > 3


def test_ratios_are_of_the_same_round() -> None:
    assert ratio([1, 2, 4], [2, 8, 8]) == Ratio(median=2, low=2, high=3)
    assert ratio([2.0], [1.0]) == Ratio(0.5, 0.5, 0.5)
