"""Several processes on a CPU, started by one command."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import dense_runs
import predicting
from images import make_folder, tiny_values
from predicting import Done

TWO = "train.devices=2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    values = tiny_values(make_folder(place / "images", each=8))
    small = {"depths": [1, 1], "dims": [16, 32], "stem_stride": 4}
    values["model"] = {"name": "vmamba_pico", "args": small}
    values["augment"] = {"mixup": 0.8, "cutmix": 1.0}
    values["schedule"] = {"epochs": 2, "warmup_epochs": 1}
    values["train"] |= {"batch_size": 8, "ema_decay": 0.9, "accelerator": "cpu"}
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    return place


def call(place: Path, *arguments: str) -> Done:
    """The command, in a process of its own where it starts a second one."""
    if TWO not in arguments:
        return predicting.call(place, *arguments)
    command = [sys.executable, "-m", "vmamba_cli", *arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200)
    return Done(done.returncode, done.stdout, done.stderr)


def train(place: Path, out: str, *overrides: str) -> dict[str, torch.Tensor]:
    """The raw and averaged weights that a run ends with."""
    done = call(place, "train", "recipe.yaml", "--out", out, *overrides)
    assert done.status == 0, done.stderr
    assert done.stdout.count("next: vmamba eval") == 1
    checkpoint = torch.load(place / out / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"]


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, torch.Tensor]:
    return train(place, "alone")


SHARDED = [TWO, "train.strategy=fsdp"]
EVERY = ["train.checkpoint_every=2", "train.keep_checkpoints=9"]
"""Checkpoints within an epoch, which change nothing else."""


@pytest.mark.parametrize("overrides", [[TWO], SHARDED], ids=["two processes", "two shards"])
def test_two_processes_equal_one_and_go_on_with_their_run(
    overrides: list[str], place: Path, alone: dict[str, torch.Tensor], request: pytest.FixtureRequest
) -> None:
    """From a checkpoint within the first epoch."""
    out = request.node.callspec.id
    whole = train(place, out, *overrides, *EVERY)
    assert_close(whole, alone)
    assert any(name.startswith("ema.") for name in whole)
    checkpoints = place / out / "checkpoints"
    for path in checkpoints.glob("*"):
        if not path.name.startswith("step-000000002."):
            path.unlink()
    resumed = train(place, out, *overrides, *EVERY, "--auto-resume")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(
    "overrides",
    [["train.micro_batch_size=2"], [TWO, "train.micro_batch_size=2"]],
    ids=["four passes", "two processes of two passes"],
)
def test_who_shares_a_step_changes_nothing(
    overrides: list[str], place: Path, alone: dict[str, torch.Tensor], request: pytest.FixtureRequest
) -> None:
    shared = train(place, request.node.callspec.id, *overrides)
    assert_close(shared, alone)
    assert any(name.startswith("ema.") for name in shared)


def test_a_run_goes_on_with_another_number_of_processes(place: Path, alone: dict[str, torch.Tensor]) -> None:
    """Also within an epoch, but not in other parts: Lightning counts these."""
    train(place, "other", *EVERY)
    checkpoints = place / "other" / "checkpoints"
    for path in checkpoints.glob("*"):
        if not path.name.startswith("step-000000002."):
            path.unlink()
    twos = "train.micro_batch_size=2"
    done = call(place, "train", "recipe.yaml", "--out", "other", *EVERY, twos, "--auto-resume")
    assert done.status == 2
    assert "within an epoch, read in parts of 8 samples; here they would be of 2" in done.stderr
    assert "Traceback" not in done.stderr
    assert_close(train(place, "other", *EVERY, TWO, "--auto-resume"), alone)


@pytest.mark.usefixtures("alone")
def test_two_processes_judge_each_image_once(place: Path) -> None:
    """23 images: one process has one more than the other."""
    shutil.copytree(place / "images", place / "fewer")
    (place / "fewer" / "val" / "red" / "7.png").unlink()
    tables = []
    for out, devices in (("judged by one", "train.devices=1"), ("judged by two", TWO)):
        done = call(place, "eval", "alone", "--out", out, "data.root=fewer", devices)
        assert done.status == 0, done.stderr
        with (place / out / "predictions.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    one, two = tables
    assert len(two) == 23
    for column in ("image", "true_class", "predicted_class"):
        assert [row[column] for row in one] == [row[column] for row in two]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the second process in /proc")
@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGKILL, 2, "process 0 of 2 lost another one, which died or hangs"),
        (signal.SIGTERM, 130, "interrupted after step"),
    ],
    ids=["killed", "told to go"],
)
def test_the_second_process_gets_a_signal(
    number: int, status: int, message: str, place: Path, request: pytest.FixtureRequest
) -> None:
    out = f"signalled {request.node.callspec.id}"
    command = [sys.executable, "-m", "vmamba_cli", "train", "recipe.yaml", "--out", out, TWO]
    first = subprocess.Popen(
        [*command, "schedule.epochs=1000"],
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    last = place / out / "checkpoints" / "last.ckpt"
    while not last.exists():  # it comes behind all else of the first epoch
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    (second,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(second), number)
    _, stderr = first.communicate(timeout=60)
    assert first.returncode == status, stderr
    assert message in stderr
    assert f"to go on: vmamba resume {out}" in stderr.lower()
    assert "Traceback" not in stderr
    assert torch.load(last, weights_only=True)["global_step"] >= 3


def is_of_the_run(pid: str) -> bool:
    """Whether a child process shares the run; the imports start others, ldconfig and uname, for a moment."""
    try:
        return b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="finds the second process in /proc")
def test_the_second_process_ends_with_a_first_that_is_killed_while_it_starts(place: Path) -> None:
    command = [sys.executable, "-m", "vmamba_cli", "train", "recipe.yaml", "--out", "beginning", TWO]
    first = subprocess.Popen(command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children")
    deadline = time.monotonic() + 100
    while not any(is_of_the_run(pid) for pid in children.read_text().split()):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    _, stderr = first.communicate(timeout=60)  # it returns when the second process, too, has closed the pipe
    assert f"process {first.pid}, which started this one, is gone" in stderr


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 0) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_two_processes_of_a_dense_task_equal_one(task: str, tmp_path: Path) -> None:
    """Drawn boxes and drop path follow the share of a step; BatchNorm sees the images of both processes."""
    values = dense_runs.values(task)
    if task == "segmentation":  # normed over 4 images at once, so that a share is no unit of randomness
        values["train"] |= {"micro_batch_size": None, "sync_batchnorm": True}
        values["model"] |= {"dropout": 0.0}
        values["model"]["args"]["drop_path_rate"] = 0.0
        # The biases before a BatchNorm have no gradient but rounding errors, which Adam would make large.
        values["optim"] |= {"name": "momentum", "lr": 0.01}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    # Variances of order 1 are summed in another order: they may differ by rounding relative to that.
    assert_close(train(tmp_path, "two", TWO), train(tmp_path, "one"), rtol=1e-5)
    tables = []
    for out in ("one", "two"):
        with (tmp_path / out / "metrics.csv").open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    score = {"detection": "val/box_AP", "segmentation": "val/mIoU"}[task]
    for one, two in zip(*tables, strict=True):
        assert float(two[score]) == pytest.approx(float(one[score]), abs=1e-4)
