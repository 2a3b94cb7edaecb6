import csv
import json
import os
import shutil
import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from images import COLOURS, assert_same, make_folder, tiny_values
from vmamba.data import SampleKey
from vmamba.errors import CheckpointError, DataError, RecipeError
from vmamba.models.checkpoints import open_checkpoint, read_checkpoint
from vmamba.ops import default_backend
from vmamba.train import run
from vmamba.train.evaluation import evaluate
from vmamba.train.recipe import check, override_values
from vmamba.train.session import load_recipe, open_session
from vmamba.train.stop import Interrupted
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask
from vmamba.train.trainer import trainer_for

STEPS = 4  # of an epoch: 18 images in batches of 4


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption."""
    out = tmp_path_factory.mktemp("whole")
    run.train(recipe(folder), out)
    return out


def recipe(folder: Path, *overrides: str) -> ClassificationRecipe:
    return check(ClassificationRecipe, override_values(tiny_values(folder), overrides), "test")


def weights(out: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(out / "checkpoints" / f"{name}.ckpt").state_dict())


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Have `action` run in the middle of a step, counted from 1."""
    loss, calls = ClassificationTask.training_step, [0]

    def wrapped(self: Any, model: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            action()
        return loss(self, model, batch)

    monkeypatch.setattr(ClassificationTask, "training_step", wrapped)


def test_run_folder(whole: Path, folder: Path) -> None:
    assert [row["epoch"] for row in rows(whole)] == ["1", "2", "3"]
    assert [row["step"] for row in rows(whole)] == ["4", "8", "12"]
    for row in rows(whole):
        assert {
            "lr",
            "images/s",
            "train/loss",
            "train/accuracy",
            "val/loss",
            "val/top1",
            "val/top5",
        } <= row.keys()
        assert all(float(value) >= 0 for value in row.values())
    assert load_recipe(whole / "recipe.yaml") == ClassificationTask.resolve(recipe(folder))
    assert json.loads((whole / "env.json").read_text())["torch"] == torch.__version__
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == [
        "best.ckpt",
        "best.ckpt.sha256",
        "last.ckpt",
        "last.ckpt.sha256",
        "step-000000008.ckpt",
        "step-000000008.ckpt.sha256",
    ]


def test_training_leaves_the_random_state_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    recipe_ = recipe(folder, "schedule.epochs=2")
    run.train(recipe_, tmp_path / "one")
    torch.manual_seed(6)
    run.train(recipe_, tmp_path / "two")
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert expected.shape == (3,)


@pytest.mark.parametrize("step", [1, 6, STEPS, 2 * STEPS])
def test_interrupt_and_resume_end_with_the_same_weights(
    step: int, folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match=f"to go on: vmamba resume {tmp_path}"):
            run.train(recipe(folder), tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run.resume(tmp_path)
    assert_same(weights(tmp_path), weights(whole))
    assert_same(weights(tmp_path, "best"), weights(whole, "best"))
    assert [(row["epoch"], row["step"], row["lr"], row["val/top1"]) for row in rows(tmp_path)] == [
        (row["epoch"], row["step"], row["lr"], row["val/top1"]) for row in rows(whole)
    ]


def test_an_interrupt_of_the_last_step_lets_the_run_finish(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 3 * STEPS, lambda: os.kill(os.getpid(), signal.SIGINT))
    run.train(recipe(folder), tmp_path)
    assert_same(weights(tmp_path), weights(whole))
    assert (tmp_path / "curves.png").exists()


def test_a_second_interrupt_stops_at_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 2, twice)
    with pytest.raises(Interrupted, match="stopped at once, in the middle of a step; there is no checkpoint"):
        run.train(recipe(folder), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("step", [STEPS + 1, 2 * STEPS + 3])
def test_a_crash_costs_the_epoch_and_nothing_else(
    step: int, folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(MemoryError):
            run.train(recipe(folder), tmp_path)
    run.resume(tmp_path)
    assert_same(weights(tmp_path), weights(whole))
    assert [row["epoch"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_workers_change_nothing(folder: Path, whole: Path, tmp_path: Path) -> None:
    run.train(recipe(folder, "train.workers=2"), tmp_path)
    assert_same(weights(tmp_path), weights(whole))


def test_a_finished_run_resumed_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    outcome = run.train(recipe(folder, "schedule.epochs=2"), tmp_path)
    before = weights(tmp_path)
    assert run.resume(tmp_path) == replace(outcome, trained=False)
    assert_same(weights(tmp_path), before)


def test_a_folder_that_holds_a_run_is_not_written_over(folder: Path, whole: Path) -> None:
    before = weights(whole)
    with pytest.raises(RecipeError, match="holds a run already"):
        run.train(recipe(folder, "optim.lr=1.0"), whole)
    assert_same(weights(whole), before)


def test_evaluate_needs_the_checkpoint_alone(whole: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "moved.ckpt"
    checkpoint.write_bytes((whole / "checkpoints" / "last.ckpt").read_bytes())
    scores = evaluate(checkpoint).scores
    assert scores["top1"] == pytest.approx(float(rows(whole)[-1]["val/top1"]), abs=1e-5)
    # In batches of another size sums are rounded in another order.
    assert evaluate(checkpoint, ["train.batch_size=6"]).scores == pytest.approx(scores, abs=1e-6)


def test_predict(whole: Path, folder: Path) -> None:
    images = sorted((folder / "val").glob("*/0.png"))
    predict = open_session(whole / "checkpoints" / "last.ckpt").predictor()
    predictions = predict([Image.open(path) for path in images])
    assert len(predictions) == len(images)
    for prediction in predictions:
        scores = [each.score for each in prediction.classes]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert {each.label for each in prediction.classes} == set(COLOURS)
        assert prediction.text().startswith(f"{prediction.classes[0].label} {scores[0]:.1%}")


def test_other_classes_than_the_models(whole: Path, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "other")
    (root / "val" / "red").rename(root / "val" / "purple")
    with pytest.raises(
        DataError, match=r"val: not the model's 3 classes; missing 'red', not expected 'purple'$"
    ):
        evaluate(whole / "checkpoints" / "last.ckpt", [f"data.root={root}"])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_named(workers: int, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    bad = root / "train" / "green" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError) as raised:
        run.train(recipe(root, f"train.workers={workers}"), tmp_path / "out")
    assert str(raised.value).startswith(f"{bad}: not an image, or a damaged one")
    assert str(raised.value).endswith("train.on_error=skip")
    assert "Traceback" not in str(raised.value)


def test_weights_of_a_run_start_another(folder: Path, whole: Path, tmp_path: Path) -> None:
    last = whole / "checkpoints" / "last.ckpt"
    changed = recipe(folder, f"model.weights={last}")
    model = ClassificationTask(changed).build_model(changed)
    assert_same(dict(model.state_dict()), weights(whole))
    other = recipe(folder, f"model.weights={last}", "model.name=test_vit", "model.args={}")
    with pytest.raises(CheckpointError, match="does not fit"):
        ClassificationTask(other).build_model(other)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=vmamba_pic", "model.name: unknown model 'vmamba_pic'; did you mean vmamba_pico"),
        ("model.args={no_such: 1}", "model.args: .*no_such"),
        ("data.root=null", "data.root: missing"),
        ("data.root=/nowhere", "/nowhere/train: no such folder"),
        ("train.batch_size=20", "18 training samples .* at most 18"),
        ("train.strategy=fsdp | train.precision=64-true", "64-true does not go with train.strategy fsdp"),
        ("train.micro_batch_size=3", r"3 does not divide the 4 samples that a process takes .*\(1 process\)"),
        ("train.micro_batch_size=1", "1 gives a process 1 sample at a time, an odd number"),
        ("train.loggers=[wandb]", "wandb is not installed; pip install wandb"),
        ("model.weights=/nowhere.ckpt", "/nowhere.ckpt: no such checkpoint"),
    ],
)
def test_what_cannot_run_writes_nothing(override: str, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, DataError, CheckpointError), match=message):
        run.train(recipe(folder, *override.split(" | ")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_random_crop_has_a_size_of_its_own(folder: Path) -> None:
    task = ClassificationTask(recipe(folder, "augment.train_size=24"))
    assert task.dataset("train")[SampleKey(0, 0)][0].shape == (3, 24, 24)
    assert task.dataset("val")[SampleKey(0, 0)][0].shape == (3, 32, 32)


@pytest.mark.parametrize("supported", [True, False])
def test_a_half_precision_that_the_processor_lacks_is_told(
    supported: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    warning = "this CPU has no instructions for"
    trainer_for(recipe(folder, "train.accelerator=cpu"), [])
    assert warning not in caplog.text
    trainer_for(recipe(folder, "train.accelerator=cpu", "train.precision=bf16-mixed"), [])
    assert (f"{warning} bf16-mixed" in caplog.text) is not supported


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a run, or .*/last\.ckpt$"):
        run.resume(tmp_path)


def test_a_folder_of_runs_is_not_a_run(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        if name != "a":
            (tmp_path / name / "checkpoints" / "last.ckpt").touch()
    named = ", ".join(str(tmp_path / name) for name in "bcd")
    for read, problem in (
        (run.resume, "not a run, or one that has no checkpoint yet"),
        (open_session, "no checkpoint in this folder"),
    ):
        with pytest.raises(CheckpointError) as raised:
            read(tmp_path)
        assert str(raised.value).startswith(f"{tmp_path}: {problem}")
        assert str(raised.value).endswith(f"; name one of the runs in it: {named} and 1 more")


def test_what_is_trained_is_told_at_the_start_and_each_epoch(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal, in a pipe and in log.txt alike."""
    small = "model={name: vmamba_pico, args: {depths: [1], dims: [8]}}"
    run.train(recipe(folder, small, "schedule.epochs=2"), tmp_path)
    logged = [line.split(" INFO ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert logged == capsys.readouterr().err.splitlines()
    what, how, *epochs = logged
    assert what.startswith("vmamba_pico of 0.0")
    assert what.endswith(" M parameters for 3 classes; 18 samples to train on, 18 to evaluate")
    backend = default_backend("cpu")
    assert how == f"8 steps of 4 samples on cpu, 1 thread, scans by the backend {backend}"
    assert [line.partition(": ")[0] for line in epochs] == [
        "epoch 1, step 4 of 8",
        "epoch 2, step 8 of 8",
    ]


def test_a_single_class_is_warned_of_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path / "images")
    for split in ("train", "val"):
        for name in ("blue", "green"):
            shutil.rmtree(root / split / name)
    run.train(recipe(root, "schedule.epochs=1", "schedule.warmup_epochs=0"), tmp_path / "run")
    warning = "warning: the data have one class alone, 'red': every score will be perfect"
    assert capsys.readouterr().err.count(warning) == 1


def test_evaluations_show_how_far_they_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, between steps; and in an evaluation alone, as a bar of its batches."""
    shown: list[str] = []
    advanced: list[int] = []
    monkeypatch.setattr(
        "vmamba.train.progress.Console", lambda stderr: Console(file=StringIO(), force_terminal=True)
    )
    monkeypatch.setattr("vmamba.train.progress.SECONDS_BETWEEN", 0)
    monkeypatch.setattr(Progress, "update", lambda self, task, **shows: shown.append(shows["description"]))
    monkeypatch.setattr(Progress, "advance", lambda self, task, steps=1: advanced.append(steps))
    run.train(recipe(folder, "schedule.epochs=2"), tmp_path)
    of_epoch = [f"evaluating {batch}/5" for batch in range(1, 6)]
    assert shown == [*4 * ["epoch 1/2"], *of_epoch, *4 * ["epoch 2/2"], *of_epoch]
    assert not advanced
    evaluate(tmp_path)
    assert sum(advanced) == 5
