"""A study keeps what it measured, says what it did not measure, and writes what it knows."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from vmamba.analysis.complexity import Complexity
from vmamba.bench.models import Measurement, SubjectError
from vmamba.bench.timing import Ratio
from vmamba.studies import Budget, Conditions, run_study, write_report
from vmamba.studies import run as studying
from vmamba.studies.tables import resolution
from vmamba.studies.writing import FILES

DRAWN = resolution(["vmamba_pico", "test_resnet"], [32, 64])
STUDY = replace(DRAWN, draw=lambda rows, path: path.touch())  # a figure takes half a second
CONDITIONS = Conditions(rounds=1, train=False, memory=False)


@pytest.fixture(scope="module")
def counts() -> dict[str, Complexity]:
    return {subject.key: studying._count(subject) for subject in STUDY.subjects}


@pytest.fixture
def measured(counts: dict[str, Complexity], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The groups that were timed; an image takes as many seconds as it has thousands of pixels."""
    groups: list[list[str]] = []

    def bench(subjects: Any, *_: Any) -> list[Measurement]:
        groups.append(list(subjects))
        return [
            Measurement(key, s.size, s.batch, 1e3 / s.size**2, Ratio(1, 1, 1), [1], "contiguous", 2**20)
            for key, (_, s) in subjects.items()
        ]

    monkeypatch.setattr(studying, "bench_settings", bench)
    monkeypatch.setattr(studying, "_count", lambda subject: counts[subject.key])
    return groups


def test_what_is_there_is_not_measured_again(measured: list[list[str]], tmp_path: Path) -> None:
    first = run_study(STUDY, tmp_path, CONDITIONS)
    assert measured == [
        ["vmamba_pico, 32²", "test_resnet, 32²"],
        ["vmamba_pico, 64²", "test_resnet, 64²"],
    ]
    assert run_study(STUDY, tmp_path, CONDITIONS) == first
    assert len(measured) == 2
    (file,) = (tmp_path / "groups").glob("inference-1-*.json")
    file.write_text("{")  # cut short
    assert run_study(STUDY, tmp_path, CONDITIONS) == first
    assert len(measured) == 3
    run_study(STUDY, tmp_path, Conditions(rounds=2, train=False, memory=False))  # under other conditions
    assert len(measured) == 5
    assert measured[-1] == ["vmamba_pico, 64²", "test_resnet, 64²"]
    assert run_study(STUDY, tmp_path, CONDITIONS) == first  # the first conditions again: all is still there
    assert len(measured) == 5


def test_what_is_written(measured: list[list[str]], tmp_path: Path) -> None:
    rows = run_study(DRAWN, tmp_path / DRAWN.name, CONDITIONS)
    folder = tmp_path / DRAWN.name
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "groups"])
    contents = json.loads((folder / "results.json").read_text())
    assert contents["environment"]["processor"]
    assert contents["rows"][0]["inference"]["images_per_second"] == 1e3 / 32**2
    with (folder / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["model"], row["size"]) for row in table] == [
        (row.subject.model, str(row.subject.size)) for row in rows
    ]
    assert float(table[2]["inference, images/s"]) == 1e3 / 64**2
    text = (folder / "table.md").read_text()
    assert "time of an image ∝ pixels^(1.00)" in text
    assert (folder / "figure.png").read_bytes()[1:4] == b"PNG"
    assert float(table[3]["inference, images/s (relative)"]) == 1
    (folder / "accuracy.md").write_text("| cross | 60.00 |\n")
    page = write_report(tmp_path, ["ladder", "resolution"]).read_text()
    assert "### Trained alike\n\n| cross | 60.00 |" in page
    assert text.splitlines()[0].removeprefix("# ") in page
    assert "(resolution/figure.png)" in page


def test_time_that_is_over(measured: list[list[str]], tmp_path: Path) -> None:
    rows = run_study(STUDY, tmp_path, CONDITIONS, Budget(0))
    assert measured == []
    assert {note for row in rows for note in row.notes} == {"inference: time ran out"}
    assert all(row.parameters and row.macs for row in rows)
    assert "- vmamba_pico, 32², inference: time ran out" in (tmp_path / "table.md").read_text()
    assert run_study(STUDY, tmp_path, CONDITIONS)[0].inference is not None  # goes on


def test_a_group_for_which_too_little_time_is_left() -> None:
    budget = Budget(60)
    assert budget.lacking(1e12) is None  # nothing is known yet
    budget.spent(1e9, 10)
    assert budget.lacking(1e9) is None
    assert budget.lacking(1e11) == "needs about 17 min, and 1 min are left"
    assert Budget().lacking(1e30) is None


def test_memory_that_is_lacking(
    measured: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: list[int] = []

    def lacking(needed: int) -> str | None:
        needs.append(needed)
        return "9.0 GiB, and 1.0 GiB are free" if len(needs) > 2 else None

    monkeypatch.setattr(studying, "lacking_memory", lacking)
    rows = run_study(STUDY, tmp_path, CONDITIONS)
    assert measured == [["vmamba_pico, 32²", "test_resnet, 32²"]]
    assert [row.notes for row in rows[2:]] == 2 * [("inference: takes 9.0 GiB, and 1.0 GiB are free",)]
    assert needs[2] > needs[0] > 0  # the larger image needs more


def test_a_model_that_computes_something_wrong_is_left_out(
    measured: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = studying.bench_settings

    def bench(subjects: Any, *arguments: Any) -> list[Measurement]:
        if "vmamba_pico, 32²" in subjects:
            raise SubjectError("vmamba_pico: the logits are not finite", "vmamba_pico, 32²")
        return measure(subjects, *arguments)

    monkeypatch.setattr(studying, "bench_settings", bench)
    rows = run_study(STUDY, tmp_path, CONDITIONS)
    assert measured == [["test_resnet, 32²"], ["vmamba_pico, 64²", "test_resnet, 64²"]]
    assert rows[0].inference is None
    assert rows[0].notes == ("inference: vmamba_pico: the logits are not finite",)
    assert all(row.inference and not row.notes for row in rows[1:])
    assert run_study(STUDY, tmp_path, CONDITIONS) == rows  # also that it failed is known
    assert len(measured) == 2
    reason = "inference: vmamba_pico, 32², was not measured; its group is relative to test_resnet, 32²"
    assert reason in (tmp_path / "table.md").read_text()


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The overrides with which weights were judged."""
    calls: list[str] = []

    class Judgement:
        def __init__(self, top1: float) -> None:
            self.scores = {"top1": top1}

    def evaluate(what: str, overrides: list[str]) -> Judgement:
        calls.append(*overrides)
        return Judgement(0.5)

    monkeypatch.setattr("vmamba.train.evaluation.evaluate", evaluate)
    return calls


def test_weights_are_judged_once_at_each_size(
    measured: list[list[str]], judged: list[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    conditions = Conditions(rounds=1, train=False, memory=False, accuracy={"vmamba_pico": str(recipe)})
    rows = run_study(STUDY, tmp_path / "out", conditions)
    assert [row.top1 for row in rows] == [0.5, None, 0.5, None]
    assert judged == ["data.image_size=32", "data.image_size=64"]
    run_study(STUDY, tmp_path / "out", conditions)
    assert len(judged) == 2
    assert len(measured) == 2  # the accuracy is no condition of the speed
