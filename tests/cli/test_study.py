"""`vmamba study`: what it writes, and what it refuses before the work."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

pytest.importorskip("lightning")

from vmamba.bench import timing
from vmamba.bench.models import Setting
from vmamba_cli.__main__ import app
from vmamba_cli.study import _print_table

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
    ("terminal", "width", "titles", "values"),
    [
        (True, 40, ["images/s"], ["1,234"]),
        (True, 50, ["GMACs", "images/s"], ["4.86", "1,234"]),
        (False, 40, ["GMACs", "images/s", "quoted"], ["4.86", "1,234", "1,343"]),
    ],
    ids=["narrow", "wider", "no terminal"],
)
def test_a_table_fits_into_the_terminal(
    terminal: bool, width: int, titles: list[str], values: list[str]
) -> None:
    """No value is broken; what is left out is in the file, and nothing is where there is no terminal."""
    cells = [
        ["", "GMACs", "inference, images/s", "quoted", "top-1, %"],
        ["a model with a long name", "4.86", "1,234", "1,343", ""],
    ]
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=terminal, color_system=None)
    _print_table(console, "A study", cells, Path("study/table.md"))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width or not terminal
    assert [title for title in cells[0][1:] if any(title.split()[-1] in line for line in lines)] == [
        title for title in cells[0] if any(title.endswith(each) for each in titles)
    ]
    assert any(line.split() == ["a", "model", "with", "a", "long", "name", *values] for line in lines)
    assert ("More columns: study/table.md" in lines) == (len(titles) < 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--autocast", "int8"), "--autocast"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--accuracy", "vmamba_pico"), "expected MODEL=WHAT"),
        (("--accuracy", "vmamba_pico=no/such/run"), "no such checkpoint"),
        (
            ("--accuracy", "vmamba_pica=runs/one"),
            "not a model of this study, which has test_resnet, vmamba_pico",
        ),
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
    done = call(*SMALL, "--out", str(tmp_path / "new"), *wrong)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not (tmp_path / "new").exists()


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


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vmamba.studies.run.bench_settings", stopped)
    done = call(*SMALL, "--out", str(tmp_path / "new"))
    assert done.exit_code == 130
    assert "holds what is finished, and the same command goes on" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "optim.lr=1"), "name its recipe by --recipe"),
        (("--seeds", "2"), "name its recipe by --recipe"),
        (("--recipe", "recipes/mnist_pico.yaml", "--model", "vmamba_tiny"), "the recipe trains vmamba_pico"),
        (("--recipe", "recipes/mnist_pico.yaml", "--set", "train.devices=2"), "trains in one process"),
        (("--routes", "spiral"), "models and VSSBlock also take 'cascade'"),
    ],
    ids=["overrides", "seeds", "another model", "two processes", "unknown pattern"],
)
def test_patterns_that_are_refused(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmamba.studies.run.bench_settings", lambda *_: pytest.fail("the work began"))
    done = call("study", "patterns", "--out", str(tmp_path / "new"), *options)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())


@pytest.mark.parametrize("named", [(), ("--model", "vmamba_pico")], ids=["recipe", "also by its name"])
def test_patterns_are_of_the_recipes_model(
    named: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed is what is trained: its arguments and its size of images."""
    timed: list[tuple[int, dict[str, object]]] = []

    def bench(settings: dict[str, tuple[str, Setting]], *_: object) -> list[object]:
        timed.extend((setting.size, dict(setting.args)) for _, setting in settings.values())
        raise KeyboardInterrupt

    monkeypatch.setattr("vmamba.studies.run.bench_settings", bench)
    recipe = (
        "--recipe",
        "recipes/mnist_pico.yaml",
        "--set",
        "model.args={dims: [8, 16, 32], depths: [1, 1, 1]}",
    )
    call("study", "patterns", *named, *recipe, "--routes", "cross", "--out", str(tmp_path / "new"))
    assert timed == [(28, {"dims": [8, 16, 32], "depths": [1, 1, 1], "routes": "cross"})]
