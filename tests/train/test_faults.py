"""What goes wrong in a run: it is told, the last checkpoint stays, and the run goes on from it."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from images import assert_same, make_folder, tiny_values
from vmamba.errors import CheckpointError, DataError, RecipeError
from vmamba.models.checkpoints import read_checkpoint
from vmamba.train import run
from vmamba.train.checkpoint import newest_checkpoint
from vmamba.train.guard import NonFiniteError, first_nonfinite
from vmamba.train.recipe import check, override_values
from vmamba.train.stop import Interrupted
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask

STEPS = 4  # of an epoch: 18 images in batches of 4


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults."""
    out = tmp_path_factory.mktemp("whole")
    run.train(recipe(folder), out)
    return out


def recipe(folder: Path, *overrides: str) -> ClassificationRecipe:
    values = override_values(tiny_values(folder), ["train.ema_decay=0.9", *overrides])
    return check(ClassificationRecipe, values, "test")


def weights(out: Path, name: str = "last") -> dict[str, Tensor]:
    return read_checkpoint(out / "checkpoints" / f"{name}.ckpt")["state_dict"]


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any) -> None:
    """Have `action` change what the loss of a step is, counted from 1."""
    loss, calls = ClassificationTask.training_step, [0]

    def wrapped(self: Any, model: nn.Module, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] >= step:
            batch = action(model, batch, calls[0]) or batch
        return loss(self, model, batch)

    monkeypatch.setattr(ClassificationTask, "training_step", wrapped)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_runs_end_with_the_same_weights() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "faults" / "kill.py"
    command = [sys.executable, str(script), "--kills", "2", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 killed runs ended with the same weights" in done.stdout


def spoil(model: nn.Module, batch: Any, call: int) -> None:
    """Make the output of one layer overflow, until it is undone."""
    layer = model.stages[0].blocks[0].norm  # type: ignore[union-attr,index]
    layer.weight.data.fill_(float("inf"))


def nan_image(model: nn.Module, batch: Any, call: int) -> Any:
    images, labels = batch
    return images.clone().index_fill_(0, torch.tensor([1]), float("nan")), labels


def test_a_loss_that_is_not_finite_stops_the_run(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, STEPS + 2, spoil)
        with pytest.raises(NonFiniteError) as raised:
            run.train(recipe(folder), tmp_path)
    message = str(raised.value)
    assert message.startswith(
        "the loss of step 6 (epoch 2) is not finite; first so: the weight stages.0.blocks.0."
    )
    assert message.count(f"{folder}/train/") == 4
    assert "train.on_nonfinite=skip" in message
    assert "the loss of step 6" in (tmp_path / "log.txt").read_text()
    run.resume(tmp_path)
    assert_same(weights(tmp_path), weights(whole))


def test_a_step_that_is_not_finite_is_left_out(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[dict[str, Tensor]] = []

    def spoil_third(model: nn.Module, batch: Any, call: int) -> Any:
        if call in (3, 4, 5):  # the step, its diagnosis, and the step after it
            seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return None if call > 4 else nan_image(model, batch, call)

    with monkeypatch.context() as patch:
        at_step(patch, 3, spoil_third)
        run.train(
            recipe(folder, "train.on_nonfinite=skip", "schedule.epochs=1", "schedule.warmup_epochs=0"),
            tmp_path,
        )
    assert "the loss of step 3 (epoch 1) is not finite" in caplog.text
    assert "the step is left out" in caplog.text
    assert_same(seen[0], seen[2])
    assert all(value.isfinite().all() for value in weights(tmp_path).values())
    header, row = (tmp_path / "metrics.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["skipped/steps"] == "1"


def test_no_finite_step_any_more(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 1, nan_image)
    with pytest.raises(NonFiniteError, match="10 steps in a row without a finite gradient, till step 10"):
        run.train(recipe(folder, "train.on_nonfinite=skip"), tmp_path)


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Root(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


@pytest.mark.parametrize(
    ("model", "x", "expected"),
    [
        (nn.Sequential(Scale(2), Scale(1e30), Scale(1e30)), 1.0, "the output of 2"),
        (nn.Sequential(Scale(2), Scale(float("nan"))), 1.0, "the weight 1.factor, before the step"),
        (nn.Sequential(Scale(2)), float("inf"), "the batch itself"),
        (nn.Sequential(Scale(1), Scale(1), Root()), 0.0, "the gradient that comes back to the output of 1"),
        (nn.Sequential(Scale(1)), 1.0, "nothing: the same samples give finite values now"),
    ],
    ids=["forward", "weight", "batch", "backward", "nothing"],
)
def test_the_first_that_is_not_finite(model: nn.Module, x: float, expected: str) -> None:
    batch = torch.full((3,), x)
    assert first_nonfinite(model, batch, lambda: model(batch).sum()) == expected
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_full_disk_leaves_the_checkpoint_before(folder: Path, whole: Path, tmp_path: Path) -> None:
    """The size of files is limited in the middle of the second epoch: its checkpoint does not fit."""
    import resource

    before: list[Any] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(model: nn.Module, batch: Any, call: int) -> None:
        before.append(weights(tmp_path))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 2 * STEPS, limit)
        try:
            with pytest.raises(
                CheckpointError, match=r"\.ckpt: could not be written .* Make room on the disk"
            ):
                run.train(recipe(folder), tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_same(weights(tmp_path), before[0])
    assert not list((tmp_path / "checkpoints").glob(".*tmp"))
    run.resume(tmp_path)
    assert_same(weights(tmp_path), weights(whole))


def test_a_damaged_checkpoint_is_passed_over(
    folder: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def crash(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        at_step(patch, 2 * STEPS + 3, crash)
        with pytest.raises(MemoryError):
            run.train(recipe(folder, "train.checkpoint_every=3", "train.keep_checkpoints=3"), tmp_path)
    checkpoints = tmp_path / "checkpoints"
    assert [path.name for path in sorted(checkpoints.glob("step-*.ckpt"))] == [
        "step-000000006.ckpt",
        "step-000000008.ckpt",
    ]
    for name in ("last", "step-000000008"):
        path = checkpoints / f"{name}.ckpt"
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:-100])
    assert newest_checkpoint(checkpoints)[0].name == "step-000000006.ckpt"
    run.resume(tmp_path)
    assert caplog.text.count("damaged, its content does not match") >= 2
    assert "going on from" in caplog.text
    assert_same(weights(tmp_path), weights(whole))


def test_all_checkpoints_damaged(folder: Path, whole: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "last.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: damaged"):
        run.resume(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="sends signals to this process")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("every", [1, 2], ids=["whole steps", "steps of two passes"])
def test_a_signal_of_the_scheduler(
    name: str, every: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM's `scontrol` is a script here that notes what it is asked."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    number = getattr(signal, name)
    before = signal.getsignal(number)
    changed = recipe(folder, f"train.micro_batch_size={4 // every}")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
        patch.setenv("SLURM_JOB_ID", "4711")
        at_step(patch, 5 * every + 1, lambda *_: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match="interrupted after step 6; job 4711 is in the queue again"):
            run.train(changed, tmp_path / "run")
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert signal.getsignal(number) == before
    run.resume(tmp_path / "run", recipe=changed)
    run.train(changed, tmp_path / "whole")
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_corrupt_image_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "images")
    for split in ("train", "val"):
        bad = root / split / "green" / "3.png"
        bad.write_bytes(bad.read_bytes()[:200])
    run.train(recipe(root, "train.on_error=skip", "train.workers=1"), tmp_path / "out")
    for split in ("train", "val"):
        assert caplog.text.count(f"left out: {root}/{split}/green/3.png: not an image, or a damaged one") == 1
    header, *_, row = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["skipped/samples"] == "2"


def test_a_dead_worker_ends_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ClassificationTask.dataset

    def deadly(self: Any, split: str) -> Any:
        data = dataset(self, split)
        load = data.source.load

        def dying(index: int) -> Any:
            if split == "train" and index == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return load(index)

        data.source.load = dying
        return data

    monkeypatch.setattr(ClassificationTask, "dataset", deadly)
    with pytest.raises(DataError, match=r"a data worker died: \d+ \(exit code -9\)"):
        run.train(recipe(folder, "train.workers=2"), tmp_path)


def test_what_may_change_when_a_run_is_resumed(folder: Path, whole: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"override 'optim.lr=1.0': a resumed run keeps what it learns by; .*--extend"
    ):
        run.resume(whole, ["optim.lr=1.0"])
    with pytest.raises(
        RecipeError, match=r"a run of another recipe, it differs in optim.lr, train.seed; name"
    ):
        run.resume(whole, recipe=recipe(folder, "optim.lr=1.0", "train.seed=3", "train.workers=1"))


def test_the_average_is_what_its_definition_says(folder: Path, tmp_path: Path) -> None:
    """Of decay 0 it is the weights; of decay d after a step, d times the old ones and the rest the new."""
    run.train(recipe(folder, "train.ema_decay=0.0"), tmp_path / "none")
    state = weights(tmp_path / "none")
    for name, value in below(state, "model.").items():
        torch.testing.assert_close(state[f"ema.module.{name}"], value, rtol=0, atol=0)
    once = recipe(
        folder,
        "train.ema_decay=0.7",
        "schedule.epochs=1",
        "schedule.warmup_epochs=0.5",
        "train.batch_size=18",
    )
    run.train(once, tmp_path / "once")
    state = weights(tmp_path / "once")
    from vmamba.data import seeded

    with seeded("initialisation", once.train.seed):
        first = ClassificationTask(once).build_model(once).state_dict()
    for name, value in below(state, "model.").items():
        expected = 0.7 * first[name] + 0.3 * value
        torch.testing.assert_close(state[f"ema.module.{name}"], expected, rtol=1e-6, atol=1e-7)
    rows = (tmp_path / "once" / "metrics.csv").read_text()
    assert "val/ema_top1" in rows
    assert "val/top1" in rows


def test_tensorboard_is_written(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    assert {"train/loss", "val/top1", "val/ema_top1"} <= set(events.Tags()["scalars"])
    assert json.loads((whole / "env.json").read_text())["processes"] == 1


@pytest.mark.parametrize("what", ["raise", "skip"])
def test_outputs_that_are_not_finite_are_not_scored(
    what: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The weights are spoilt behind the last step: no loss of training tells."""
    validate = ClassificationTask.validation_step

    def spoilt(self: Any, model: nn.Module, batch: Any, metrics: Any) -> Any:
        model.head.fc.weight.data.fill_(float("nan"))  # type: ignore[union-attr,operator]
        return validate(self, model, batch, metrics)

    monkeypatch.setattr(ClassificationTask, "validation_step", spoilt)
    changed = recipe(folder, "schedule.epochs=1", "schedule.warmup_epochs=0", f"train.on_nonfinite={what}")
    message = "the evaluation after step 4 is not finite, first for "
    if what == "skip":
        run.train(changed, tmp_path)
        assert message in caplog.text
        return
    with pytest.raises(NonFiniteError, match=message) as raised:
        run.train(changed, tmp_path)
    assert f"{folder}/val/" in str(raised.value)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP")
def test_a_lost_connection_leaves_a_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 6, lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    with pytest.raises(Interrupted, match="interrupted after step 6"):
        run.train(recipe(folder), tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 6


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_a_disk_that_is_full_from_the_start(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """One message, of the first checkpoint, which does not speak of resuming."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(*_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, STEPS, limit)
        try:
            with pytest.raises(CheckpointError, match="could not be written") as raised:
                run.train(recipe(folder), tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(raised.value).endswith(
        "there is no checkpoint yet. Make room on the disk, then start the run again"
    )
    assert "Traceback" not in capsys.readouterr().err
