"""Patterns trained alike: the seeds, the table, and what happens to a training that was there."""

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lightning")

from images import make_folder, tiny_values
from vmamba.errors import RecipeError
from vmamba.studies import Budget
from vmamba.studies import training as studying
from vmamba.studies.training import Trained, table, train_patterns
from vmamba.train.guard import NonFiniteError


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny_values(make_folder(tmp_path_factory.mktemp("data")))
    values["model"] = {
        "name": "vmamba_pico",
        "args": {"dims": [4, 8], "depths": [1, 1], "stem_stride": 4},
    }
    values["schedule"] = {"epochs": 1, "warmup_epochs": 0}
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_patterns_are_trained_and_kept(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = train_patterns(recipe, ["cross", "bidirectional"], 1, tmp_path)
    assert [outcome.routes for outcome in outcomes] == ["cross", "bidirectional"]
    assert all(len(outcome.scores) == 1 and not outcome.problems for outcome in outcomes)
    saved = [
        yaml.safe_load((tmp_path / "runs" / f"{name}-0" / "recipe.yaml").read_text())
        for name in ("cross", "bidirectional")
    ]
    assert [values["model"]["args"]["routes"] for values in saved] == ["cross", "bidirectional"]
    assert saved[0]["train"]["seed"] == saved[1]["train"]["seed"] == 0
    assert json.loads((tmp_path / "accuracy.json").read_text())["patterns"][0]["mean"] == outcomes[0].mean
    monkeypatch.setattr("vmamba.train.run.train", lambda *_: pytest.fail("it was trained already"))
    again = train_patterns(recipe, ["cross", "bidirectional"], 1, tmp_path, budget=Budget(0))
    assert again == outcomes


def test_a_training_that_is_not_finite_is_told(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: object) -> None:
        raise NonFiniteError("step 7: the loss is nan")

    monkeypatch.setattr(studying.run, "train", diverging)
    (outcome,) = train_patterns(recipe, ["bidirectional"], 2, tmp_path)
    assert outcome == Trained(
        "bidirectional", (), ("seed 0: step 7: the loss is nan", "seed 1: step 7: the loss is nan"), 0
    )
    assert "seed 1: step 7" in table([outcome])


def test_no_training_begins_when_time_is_over(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studying.run, "train", lambda *_: pytest.fail("time is over"))
    (outcome,) = train_patterns(recipe, ["cross"], 3, tmp_path, budget=Budget(0))
    assert outcome == Trained("cross", (), (), 3)
    assert "| cross |  |  | 0 | 3 | none |" in table([outcome])


def test_mean_and_spread() -> None:
    outcome = Trained("cross", (0.5, 0.6, 0.7), (), 0)
    assert outcome.mean == pytest.approx(0.6)
    assert outcome.deviation == pytest.approx(0.1)
    assert "| cross | 60.00 | 10.00 | 3 |  | none |" in table([outcome])
    assert Trained("cross", (0.5,), (), 0).deviation is None


@pytest.mark.parametrize("change", ["data", "rate"])
def test_trainings_of_another_recipe_are_refused(
    change: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the folder of the data changed: a run may go on with moved data, a study compares."""
    train_patterns(recipe, ["cross", "cross"], 1, tmp_path)
    monkeypatch.setattr(studying.run, "train", lambda *_: pytest.fail("a training began"))
    monkeypatch.setattr(studying.run, "resume", lambda *_: pytest.fail("a training went on"))
    other = f"data.root={make_folder(tmp_path / 'other')}" if change == "data" else "optim.lr=0.5"
    with pytest.raises(RecipeError, match=f"cross-0: .* it differs in {other.partition('=')[0]};"):
        train_patterns(recipe, ["cross"], 1, tmp_path, [other])
    (outcome,) = train_patterns(recipe, ["cross"], 1, tmp_path, ["train.log_every=7"])
    assert len(outcome.scores) == 1


@pytest.mark.parametrize("asked", ["train.devices=2", "train.nodes=2", "torchrun"])
def test_several_processes_are_refused(
    asked: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would run the whole study, and then train beside the others in the same folders."""
    monkeypatch.setattr(studying.run, "train", lambda *_: pytest.fail("a training began"))
    if asked == "torchrun":
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="a study trains in one process, and here are 2"):
        train_patterns(recipe, ["cross"], 1, tmp_path, [asked] if "=" in asked else [])
