"""`vmamba study`: what it writes, and what it refuses before the work."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("lightning")

from vmamba.bench import timing
from vmamba_cli.__main__ import app

SMALL = ("study", "resolution", "--model", "vmamba_pico", "--model", "test_resnet", "--input", "32")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST", 0)
    torch.set_num_threads(1)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_a_study(tmp_path: Path) -> None:
    options = ("--rounds", "1", "--batch", "2", "--no-memory", "--train", "--out", str(tmp_path / "new"))
    done = call(*SMALL, *options)
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "new" / "resolution" / "results.json").read_text())["rows"]
    assert [row["subject"]["model"] for row in rows] == ["vmamba_pico", "test_resnet"]
    assert all(row["inference"]["images_per_second"] > 0 for row in rows)
    assert all(row["training"]["images_per_second"] > 0 for row in rows)
    assert "# Models at larger images" in (tmp_path / "new" / "report.md").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--autocast", "int8"), "--autocast"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--accuracy", "vmamba_pico"), "expected MODEL=WHAT"),
        (("--accuracy", "vmamba_pico=no/such/run"), "no such checkpoint"),
        (("--model", "vmamba_huge"), "unknown model"),
        (("--rounds", "0"), "--rounds"),
        (("--minutes", "-1"), "--minutes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_refused_before_the_work(
    wrong: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmamba.studies.run.bench_settings", lambda *_: pytest.fail("the work began"))
    done = call(*SMALL, "--out", str(tmp_path), *wrong)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmamba.studies.run.bench_settings", lambda *_: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    done = call(*SMALL, "--out", str(tmp_path / "file"))
    assert done.exit_code == 2
    assert "cannot write to" in " ".join(done.output.split())


def test_a_recipe_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmamba.studies.run.bench_settings", lambda *_: pytest.fail("the work began"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: classification\nschedule: {epochs: none}\n")
    done = call("study", "patterns", "--recipe", str(recipe), "--out", str(tmp_path))
    assert done.exit_code == 2
    assert "schedule.epochs" in done.output
