"""`vmamba bench`: what it writes, and what it refuses before the work."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from vmamba.bench import timing
from vmamba_cli.__main__ import app

MODELS = ("bench", "models", "vmamba_pico", "--input", "32", "--batch", "1", "--rounds", "1")
OPS = ("bench", "ops", "vmamba_pico", "--input", "32", "--batch", "1", "--rounds", "1")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST", 0)
    torch.set_num_threads(1)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_models(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    several = ("test_resnet", "--input", "64", "--threads", "1", "--backend", "chunked")
    done = call(*MODELS, *several, "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "inference, backend chunked, 64², batch 1, cpu, 1 thread\n" in done.output
    results = json.loads((out / "results.json").read_text())
    assert results["environment"]["threads"] == 1
    rows = results["results"]
    assert [(row["model"], row["size"]) for row in rows] == [
        ("vmamba_pico", 32),
        ("test_resnet", 32),
        ("vmamba_pico", 64),
        ("test_resnet", 64),
    ]
    assert {row["backend"] for row in rows} == {"chunked"}
    assert (out / "throughput.png").read_bytes()[1:4] == b"PNG"


def test_memory() -> None:
    done = call(*MODELS, "--memory")
    assert done.exit_code == 0, done.output
    title, cells = done.output.splitlines()[-2:]
    assert title.split()[-2:] == ["peak", "MB"]
    assert cells.split()[-1] == "–" or int(cells.split()[-1]) >= 0


def test_ops(tmp_path: Path) -> None:
    done = call(*OPS, "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "all of an image" in done.output
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["shape"]["n_state"] == 1


def test_ops_of_one_backend(tmp_path: Path) -> None:
    done = call(*OPS, "--backend", "reference", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    timed = {row["backend"] for row in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert timed & {"reference", "chunked", "cpu", "triton"} == {"reference"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*OPS, "--backend", "nosuch"), "there is no 'nosuch'"),
        ((*MODELS, "--backend", "nosuch"), "there is no 'nosuch'"),
        ((*MODELS, "vmamba_huge"), "unknown model 'vmamba_huge'"),
        ((*MODELS, "vmamba_pico"), "models: expected different names, got vmamba_pico, vmamba_pico"),
        (("bench", "ops", "test_resnet"), "test_resnet has no selective scan"),
        (
            ("bench", "models", "swin_tiny_patch4_window7_224", "--input", "3"),
            "does not work with 3×3 images",
        ),
        (("bench", "ops", "vmamba_huge"), "unknown model 'vmamba_huge'"),
        (("bench", "ops", "vmamba_pico", "--input", "999999999"), "does not take an input of"),
    ],
)
def test_errors_are_one_message(arguments: tuple[str, ...], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("vmamba: ")
    assert message in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [MODELS, OPS], ids=["models", "ops"])
def test_triton_without_a_gpu_is_one_message(command: tuple[str, ...]) -> None:
    done = call(*command, "--backend", "triton")
    assert done.exit_code == 2
    assert done.stderr.startswith("vmamba: ")
    assert "'triton' cannot" in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ("--autocast", "int8"),
        ("--device", "nowhere"),
        ("--batch", "0"),
        ("--input", "0"),
        ("--rounds", "0"),
        ("--threads", "0"),
    ],
    ids=lambda wrong: wrong[0],
)
def test_options_out_of_range(wrong: tuple[str, str]) -> None:
    done = call("bench", "models", "vmamba_pico", *wrong)
    assert done.exit_code == 2
    assert wrong[0] in done.output
    assert "Traceback" not in done.output


@pytest.fixture(params=["models", "ops", "data"])
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A command that must not get as far as its work."""

    def work(*_: object, **__: object) -> None:
        pytest.fail("the work began before the folder was checked")

    monkeypatch.setattr("vmamba.bench.models.bench_models", work)
    monkeypatch.setattr("vmamba.bench.operator.shapes", work)
    monkeypatch.setattr("vmamba.train.session.load_recipe", work)
    return {"models": MODELS, "ops": OPS, "data": ("bench", "data", "recipe.yaml")}[request.param]


def test_a_folder_that_cannot_be_written_is_refused_first(command: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "taken" / "results.json").mkdir(parents=True)
    expected = {
        file: os.strerror(errno.EEXIST),
        file / "below": os.strerror(errno.ENOTDIR),
        tmp_path / ("x" * 300): os.strerror(errno.ENAMETOOLONG),
        tmp_path / "taken": "a file of that name is to be written",
        Path("/proc/self/results"): os.strerror(errno.ENOENT),
    }
    for out, reason in expected.items():
        done = call(*command, "--out", str(out))
        assert done.exit_code == 2, done.output
        assert done.stderr.startswith("vmamba: --out: ")
        assert reason in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_first(command: tuple[str, ...], tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    for out in (tmp_path, tmp_path / "below"):
        done = call(*command, "--out", str(out))
        assert done.exit_code == 2
        assert os.strerror(errno.EACCES) in done.stderr


def test_a_disk_that_fills_up_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    done = call(*OPS, "--out", str(tmp_path))
    assert done.exit_code == 2
    assert "all of an image" in done.output  # the results themselves were shown
    assert f"results.json: {os.strerror(errno.ENOSPC)}" in done.stderr


@pytest.mark.parametrize("workers", ["-1", "a", "1,,2", ""])
def test_numbers_of_workers(workers: str) -> None:
    done = call("bench", "data", "recipe.yaml", "--workers", workers)
    assert done.exit_code == 2
    assert "--workers: expected whole numbers with commas between" in done.output
