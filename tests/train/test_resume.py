"""A run is extended, and goes on with nothing but its own data, in one process at a time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from images import assert_same, make_folder, tiny_values
from vmamba.errors import DataError, OutputError, RecipeError
from vmamba.models.checkpoints import CONTENTS, checksum_path, read_checkpoint
from vmamba.train import run
from vmamba.train.curves import read_metrics
from vmamba.train.lock import locked
from vmamba.train.recipe import check, override_values
from vmamba.train.session import load_recipe
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask


def recipe(folder: Path, *overrides: str) -> ClassificationRecipe:
    return check(ClassificationRecipe, override_values(tiny_values(folder), overrides), "test")


def last(out: Path) -> dict[str, Any]:
    return read_checkpoint(out / "checkpoints" / "last.ckpt")


@pytest.fixture
def finished(folder: Path, tmp_path: Path) -> Path:
    run.train(recipe(folder, "schedule.epochs=2", "augment.mixup=0"), tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_is_extended(finished: Path) -> None:
    """A longer cosine and another rate; the optimiser keeps its averages of the gradients."""
    before = last(finished)
    with pytest.raises(RecipeError, match=r"'schedule.epochs=4'.* keeps what it learns by.* add --extend"):
        run.resume(finished, ["schedule.epochs=4"])
    outcome = run.resume(
        finished / "checkpoints" / "last.ckpt", ["schedule.epochs=4", "optim.lr=4e-3"], extend=True
    )
    after = last(finished)
    assert after["global_step"] == 16
    assert outcome.best_step <= 16
    assert load_recipe(finished / "recipe.yaml").schedule.epochs == 4
    rows = read_metrics(finished / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    # The third epoch ends two thirds along the new curve, behind one epoch of warm-up.
    expected = 5e-6 + (4e-3 - 5e-6) * (1 + torch.cos(torch.tensor(torch.pi * 8 / 12)).item()) / 2
    assert float(rows[2]["lr"]) == pytest.approx(expected, rel=1e-4)
    one, other = (each["optimizer_states"][0]["state"][0]["step"] for each in (before, after))
    assert other - one == 8
    changes = {"schedule.epochs": [2, 4], "optim.lr": [2e-3, 4e-3]}
    history = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert [(event["step"], event.get("changes")) for event in history] == [(0, None), (8, changes)]
    assert after[CONTENTS]["history"][-1]["changes"] == changes


def test_an_extended_run_is_resumed_as_it_is(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within what it was extended by, it goes on by the new recipe."""
    step, calls = ClassificationTask.training_step, [0]

    def crash(self: Any, model: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:
            raise MemoryError
        return step(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", crash)
        with pytest.raises(MemoryError):
            run.resume(finished, ["schedule.epochs=4", "optim.weight_decay=0.2"], extend=True)
    assert last(finished)["global_step"] == 12
    run.resume(finished)
    groups = last(finished)["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0, 0.2}
    assert last(finished)["global_step"] == 16


def test_what_extending_does_not_allow(finished: Path) -> None:
    for override in ("train.batch_size=6", "model.name=test_vit", "optim.name=sgd", "train.seed=3"):
        with pytest.raises(RecipeError, match="a resumed run keeps its recipe"):
            run.resume(finished, [override], extend=True)
    with pytest.raises(RecipeError, match="schedule: 4 steps are fewer than the 8 that the run has done"):
        run.resume(finished, ["schedule.epochs=1", "schedule.warmup_epochs=0"], extend=True)


def test_a_run_stops_early(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After two evaluations in a row without a better score; resumed, it has nothing to do."""
    scores = iter([0.5, 0.4, 0.6, 0.5, 0.6, 0.7, 0.7])
    real = run.TaskModule.evaluate

    def evaluate(self: Any, loader: Any, after_batch: Any) -> dict[str, float]:
        return {**real(self, loader, after_batch), "val/top1": next(scores)}

    monkeypatch.setattr(run.TaskModule, "evaluate", evaluate)
    outcome = run.train(recipe(folder, "schedule.epochs=9", "schedule.patience=2"), tmp_path)
    assert (last(tmp_path)["global_step"], outcome.best, outcome.best_step) == (20, 0.6, 12)
    assert run.resume(tmp_path) == replace(outcome, trained=False)
    assert "this run is finished" not in (tmp_path / "log.txt").read_text()
    assert "stopped early: 2 evaluations without a better val/top1" in (tmp_path / "log.txt").read_text()
    run.resume(tmp_path, ["schedule.patience=3"], extend=True)
    assert last(tmp_path)["global_step"] > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: [
                (root / split / "blue").rename(root / split / "white") for split in ("train", "val")
            ],
            r"3 classes are not the 3 .*missing 'blue', not expected 'white';",
        ),
        (
            lambda root: [(root / split / "green").rename(root / split / "a") for split in ("train", "val")],
            r"missing 'green', not expected 'a';",
        ),
        (
            lambda root: (root / "train" / "red" / "9.png").write_bytes(
                (root / "train" / "red" / "0.png").read_bytes()
            ),
            "the split 'train' has 19 samples, and had 18 when the run was started",
        ),
        (
            lambda root: (root / "val" / "red" / "0.png").unlink(),
            "the split 'val' has 17 samples, and had 18 when the run was started",
        ),
    ],
    ids=["renamed", "reordered", "a sample more", "a sample fewer to judge"],
)
def test_other_data_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    run.train(recipe(root, "schedule.epochs=1", "schedule.warmup_epochs=0"), tmp_path / "run")
    change(root)
    with pytest.raises(DataError, match=message):
        run.resume(tmp_path / "run")


def test_one_run_at_a_time(folder: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from vmamba.train.lock import locked
with locked(Path({str(tmp_path / "run")!r})):
    print("locked", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(RecipeError, match=rf"process {other.pid} on .* is running in this folder"):
            run.train(recipe(folder), tmp_path / "run")
    finally:
        other.kill()
        other.communicate()
    with locked(tmp_path / "run"):  # let go of by the end of the other process
        pass


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="cannot be the folder of a run"):
        run.train(recipe(folder), tmp_path / "run")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (out / "metrics.csv").write_text("when,what\n1,2\n"), "not the metrics of a run"),
        (lambda out: (out / "metrics.csv").write_bytes(b"epoch,step\n\xff,1\n"), "not the metrics of a run"),
        (lambda out: (out / "metrics.csv").mkdir(), "a folder, where the run writes a file"),
        (lambda out: (out / "log.txt").mkdir(), "a folder, where the run writes a file"),
        (lambda out: (out / "checkpoints").write_text(""), "a file, where the run makes a folder"),
        (lambda out: (out / "tensorboard").write_text(""), "a file, where the run makes a folder"),
    ],
)
def test_foreign_files_are_found_before_the_first_step(
    make: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(RecipeError, match=message):
        run.train(recipe(folder), tmp_path)
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_file_is_no_folder_of_a_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OutputError, match="cannot be the folder of a run"):
        run.train(recipe(folder), tmp_path / "run")


def test_rows_of_a_run_without_checkpoint_go(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss\n1,2,7\n")
    run.train(recipe(folder, "schedule.epochs=1", "schedule.warmup_epochs=0"), tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == ["4"]


def test_a_flipped_bit_is_noticed_without_the_checksum_beside(finished: Path) -> None:
    path = finished / "checkpoints" / "last.ckpt"
    checksum_path(path).unlink()
    expected: Tensor = last(finished)["state_dict"]["model.head.fc.weight"]
    content = bytearray(path.read_bytes())
    raw = expected.contiguous().numpy().tobytes()
    at = bytes(content).index(raw)
    content[at + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match="damaged"):
        read_checkpoint(path)


def test_both_the_terminal_and_the_log_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    """From before the folder was opened, and from the run."""
    root = make_folder(tmp_path / "images")
    bad = root / "train" / "green" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    for name in ("green", "blue"):
        if name == "blue":
            for split in ("train", "val"):
                (root / split / name).rename(tmp_path / f"{split} {name}")
    changed = recipe(root, f"model.weights={finished}", "train.on_error=skip", "schedule.epochs=2")
    capsys.readouterr()
    run.train(changed, tmp_path / "out")
    told = {"terminal": capsys.readouterr().err, "file": (tmp_path / "out" / "log.txt").read_text()}
    for place, text in told.items():
        assert "the classifier starts anew: head.fc" in text, place
        assert f"left out: {bad}: not an image, or a damaged one" in text, place
        assert "2 classes; 12 samples to train on, 12 to evaluate" in text, place
        assert "epoch 2, step 6 of 6: " in text, place


def test_images_a_second_after_a_resume_within_an_epoch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is of the whole epoch, as that of a run without a stop."""
    step, calls = ClassificationTask.training_step, [0]

    def crash(self: Any, model: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise MemoryError
        return step(self, model, batch)

    changed = recipe(folder, "train.checkpoint_every=1", "schedule.epochs=2")
    run.train(changed, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", crash)
        with pytest.raises(MemoryError):
            run.train(changed, tmp_path / "stopped")
    run.resume(tmp_path / "stopped")
    whole, stopped = (read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "stopped"))
    for one, other in zip(whole, stopped, strict=True):
        assert float(other["images/s"]) > 0.1 * float(one["images/s"])
        assert {k: v for k, v in one.items() if k != "images/s"} == {
            k: v for k, v in other.items() if k != "images/s"
        }
    weights = [last(tmp_path / name)["state_dict"] for name in ("whole", "stopped")]
    assert_same(*weights)
