"""The studies' figures show ratios of the same rounds, and write no name over another."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from vmamba.bench.timing import Ratio
from vmamba.studies import figures
from vmamba.studies.study import Row, Speed, Subject


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn."""
    saved: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: saved.append(figure))
    return saved


def row(label: str, per_second: float, ratio: Sequence[float], top1: float = 80) -> Row:
    """Of 30 M parameters; `ratio` is how many times as fast the first model is, and its quartiles."""
    subject = Subject(label, label, quoted={"top-1, %": top1})
    return Row(subject, 30_000_000, 5e9, Speed(per_second, Ratio(*ratio), None))


def test_bars_are_ratios_of_the_same_rounds(drawn: list[Any], tmp_path: Path) -> None:
    """The second is twice as fast in every round; images/s also depend on how fast the machine was."""
    rows = [row("cross", 8, (1, 1, 1)), row("snake", 5, (0.5, 0.4, 0.8))]
    figures.draw_patterns(rows, tmp_path / "figure.png")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for bar in axes.patches] == [1, 2]
    assert [text.get_text() for text in axes.texts] == ["8.00", "5.00"]
    (lines,) = axes.collections
    assert [line[:, 0].tolist() for line in lines.get_segments()][1] == pytest.approx([1.25, 2.5])


def test_no_name_over_another(drawn: list[Any], tmp_path: Path) -> None:
    rows = [row(f"a model with a long name {i}", 1, 3 * [1 + i / 50], 80 + i / 50) for i in range(6)]
    figures.draw_throughput(rows, tmp_path / "figure.png")
    drawn[0].draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawn[0].axes[0].texts]
    assert len(boxes) == 6
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:i])
