import json
from pathlib import Path

import pytest

from images import make_folder, tiny_values
from vmamba.errors import DataError
from vmamba.train import run
from vmamba.train.recipe import check, override_values
from vmamba.train.runs import SORTS, find_runs
from vmamba.train.tasks.classification import ClassificationRecipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rows made up, one that only began, a damaged one, and something else."""
    place = tmp_path_factory.mktemp("runs")
    recipe = check(
        ClassificationRecipe, override_values(tiny_values(place), ["train.ema_decay=0.5"]), "test"
    ).to_yaml()
    for name in ("b/first", "begun", "damaged", "finished", "binary", "yaml"):
        (place / name).mkdir(parents=True)
        (place / name / "recipe.yaml").write_text(recipe)
        (place / name / "env.json").write_text("{}")
    header = "epoch,step,lr,images/s,train/loss,val/ema_top1,val/ema_top5,val/top1,val/top5\n"
    rows = "1,4,0.1,50,2.5,0.7,1,0.1,1\n2,8,0.1,60,1.5,0.6,1,0.9,1\n"
    (place / "b" / "first" / "metrics.csv").write_text(header + rows)
    (place / "damaged" / "metrics.csv").write_text("epoch,step\nnone,4\n")
    ties = "epoch,step,val/ema_top1,val/loss\n1,4,0.5,2\n2,8,0.8,nan\n3,12,0.8,0.25\n"
    (place / "finished" / "metrics.csv").write_text(ties)
    for name in ("b/first", "finished"):
        (place / name / "checkpoints").mkdir()
        (place / name / "checkpoints" / "last.ckpt").touch()
    (place / "lost").mkdir()
    (place / "lost" / "recipe.yaml").write_text(recipe)
    (place / "lost" / "env.json").write_text("{}")
    (place / "lost" / "metrics.csv").write_text(ties)
    (place / "binary" / "metrics.csv").write_bytes(b"epoch,step\n\xff\x00\n")
    (place / "yaml" / "recipe.yaml").write_text("[1,\n")
    (place / "other").mkdir()
    (place / "other" / "env.json").write_text("{}")
    (place / "recipe.yaml").write_text(recipe)  # no run
    (place / "other" / "recipe.yaml").write_text("eggs: 3\n")
    return place


def test_what_a_run_says(place: Path) -> None:
    runs = {found.name: found for found in find_runs(place)}
    first = runs[str(Path("b/first"))]
    assert (first.model, first.epochs, first.length, first.step) == ("test_convnext", 2, 3, 8)
    assert (first.score, first.last, first.best, first.best_epoch) == ("val/ema_top1", 0.6, 0.7, 1)
    assert (first.train_loss, first.images_per_second) == (1.5, 60)
    assert first.state == runs["begun"].state == "unfinished"
    finished = runs["finished"]
    assert (finished.state, finished.best, finished.best_epoch, finished.val_loss) == (
        "finished",
        0.8,
        2,
        0.25,
    )
    assert (runs["lost"].state, runs["lost"].best) == ("no checkpoint", 0.8)
    assert (runs["begun"].epochs, runs["begun"].last, runs["begun"].problem) == (0, None, "")
    for name in ("damaged", "other", "binary", "yaml"):
        assert "\n" not in runs[name].problem
        assert runs[name].problem.startswith(f"{place / name}: not a run of vmamba, or a damaged one")


@pytest.mark.parametrize("sort", SORTS)
def test_every_order_has_every_run(sort: str, place: Path) -> None:
    found = find_runs(place, sort)
    assert len(found) == 8
    first = {"epochs": "finished", "step": "finished", "best": "finished", "last": "finished"}
    first |= {"val_loss": "finished", "state": "finished", "train_loss": "b/first"}
    first |= {"images_per_second": "b/first", "name": "b/first"}
    if sort in first:
        assert found[0].name == str(Path(first[sort]))


def test_a_run_itself(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images")
    recipe = check(ClassificationRecipe, tiny_values(images), "test")
    scores = run.train(recipe, tmp_path / "mine").scores
    (found,) = find_runs(tmp_path / "mine")
    assert (found.name, found.score, found.epochs) == ("mine", "val/top1", 3)
    assert found.last == pytest.approx(scores["val/top1"], abs=1e-5)


def test_nothing_there(tmp_path: Path) -> None:
    assert find_runs(tmp_path) == []
    with pytest.raises(DataError, match="no such folder"):
        find_runs(tmp_path / "none")
    with pytest.raises(DataError, match="no order 'size'; there are name, model"):
        find_runs(tmp_path, "size")
    assert json.dumps([found.problem for found in find_runs(tmp_path)]) == "[]"
