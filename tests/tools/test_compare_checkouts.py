"""Two checkouts side by side; no speed is asserted."""

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))
import compare_checkouts  # noqa: E402
from compare_checkouts import CompareError, largest_difference, main, quartiles, take_turns  # noqa: E402

SMALL = ("--models", "vmamba_pico")
OPTIONS = ("--input", "32", "--batch", "2", "--rounds", "2", "--threads", "1")


def test_turns_are_in_a_random_order_and_ratios_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_checkouts, "SHORTEST", 6.0)
    calls: list[tuple[str, int]] = []

    def before(times: int) -> float:
        calls.append(("before", times))
        return 2.0

    def after(times: int) -> float:
        calls.append(("after", times))
        return 3.0

    assert take_turns(before, after, 20) == [1.5] * 20
    assert calls[:2] == [("before", 1), ("after", 1)]
    rounds = [calls[i : i + 2] for i in range(2, len(calls), 2)]
    assert all({name for name, _ in pair} == {"before", "after"} for pair in rounds)
    assert {times for pair in rounds for _, times in pair} == {2}
    first = [pair[0][0] for pair in rounds]
    assert {first.count("before"), first.count("after")}.isdisjoint({0, 20})


def test_quartiles() -> None:
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (2.0, 3.0, 4.0)
    assert quartiles([1.5]) == (1.5, 1.5, 1.5)


def test_differences() -> None:
    assert largest_difference([1.0, -4.0], [1.0, -4.0]) == 0
    assert largest_difference([1.0, -4.0], [1.0, -3.0]) == 0.25
    with pytest.raises(CompareError, match="differ in number: 1 and 2"):
        largest_difference([1.0], [1.0, 2.0])
    with pytest.raises(CompareError, match="not finite"):
        largest_difference([float("nan")], [float("nan")])


class FakeWorker:
    """Answers as a checkout would."""

    def __init__(self, logits: list[float], seconds: float) -> None:
        self.logits, self.seconds = logits, seconds

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        return {"build": {"logits": self.logits}, "time": {"seconds": self.seconds}}[request]


@pytest.mark.parametrize(
    ("after", "options", "as_asked"),
    [
        (([1.0, 2.0], 1.0), (), True),
        (([1.0, 2.0], 1.1), (), True),
        (([1.0, 2.0], 1.1), ("--limit", "1.02"), False),
        (([1.0, 2.0], 1.01), ("--limit", "1.02"), True),
        (([1.0, 2.1], 1.0), (), False),
        (([1.0, 2.1], 1.0), ("--tolerance", "0.1"), True),
    ],
)
def test_what_is_asked_for(
    after: tuple[list[float], float],
    options: tuple[str, ...],
    as_asked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compare_checkouts, "PAUSE", 0)
    parsed = compare_checkouts.parse(["a", "b", "--rounds", "2", *options])
    workers = FakeWorker([1.0, 2.0], 1.0), FakeWorker(*after)
    setting = compare_checkouts.Setting("model", 1, 1, False, None, False, "cpu", None)
    assert compare_checkouts.compare(workers, setting, parsed) is as_asked


def test_a_checkout_against_itself(capfd: pytest.CaptureFixture[str]) -> None:
    mode = ("--train", "--autocast", "bf16")
    assert main([sys.executable, sys.executable, *SMALL, "nosuch", *OPTIONS, *mode]) == 2
    printed = capfd.readouterr()
    before, after, result = printed.out.splitlines()
    assert before.removeprefix("before") == after.removeprefix("after")
    assert result.startswith("vmamba_pico, training step, batch 2, 32²: after / before ")
    assert result.endswith("the same logits")
    assert "Unknown model (nosuch)" in printed.err.splitlines()[-1]


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """A checkout whose models give other logits, and print on import."""
    package = tmp_path / "src" / "vmamba"
    package.parent.mkdir()
    package.mkdir()
    real = ROOT / "src" / "vmamba"
    (package / "__init__.py").write_text(f"""
__path__ = [{str(real)!r}]
print("hello")
exec(compile(open({str(real / "__init__.py")!r}).read(), __file__, "exec"))
forward = VMamba.forward
VMamba.forward = lambda self, x: forward(self, x) + 1
""")
    return tmp_path


def test_another_checkout_by_its_folder(changed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([sys.executable, str(changed), *SMALL, *OPTIONS]) == 1
    _, after, result = capfd.readouterr().out.splitlines()
    assert str(changed) in after
    assert "logits differ by" in result
    assert result.endswith(": NOT AS ASKED FOR")


def test_what_cannot_be_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), sys.executable]) == 2
    assert main([sys.executable, str(tmp_path / "python")]) == 2
    first, second = capfd.readouterr().err.splitlines()
    assert "expected a Python interpreter or a checkout" in first
    assert "cannot be run: No such file" in second
