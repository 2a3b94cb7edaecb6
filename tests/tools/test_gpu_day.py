"""The first hour on a GPU, at toy sizes in the interpreter; no speed is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "gpu_day.py"
sys.path.append(str(ROOT / "tools"))
from gpu_day import STAGES, Scale  # noqa: E402


def call(*arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(TOOL), "--toy", "--out", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=290)


def results(folder: Path, stage: str) -> list[dict]:
    return json.loads((folder / f"{stage}.json").read_text())["results"]


@pytest.mark.slow
def test_every_stage(tmp_path: Path) -> None:
    """Minutes, most of them imports: each stage is a process."""
    pytest.importorskip("triton")
    done = call(folder=tmp_path)
    logs = {path.name: path.read_text()[-2000:] for path in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stdout, done.stderr, logs)
    report = (tmp_path / "README.md").read_text()
    assert report.count("passed") == len(STAGES)
    assert (tmp_path / "plans.json").exists()
    for stage in STAGES:
        assert results(tmp_path, stage), stage
    assert {row["model"] for row in results(tmp_path, "models")} == {"gpu_day_toy", "test_resnet"}
    assert {row["backend"] for row in results(tmp_path, "operator")} >= {"triton", "chunked"}
    assert results(tmp_path, "proof")[0]["verdict"]["reason"] is None


def test_a_stage_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """The time of a stage is over before it begins: it says so, and the next one runs."""
    pytest.importorskip("triton")
    done = call("--limit", "44", "profile", "environment", folder=tmp_path)
    assert done.returncode == 1
    assert [row["error"] for row in results(tmp_path, "profile")] == 2 * ["the time is over"]
    assert results(tmp_path, "environment")[-1]["bytes_per_second"] > 0
    report = (tmp_path / "README.md").read_text()
    assert "| profile | FAILED |" in report
    assert "| environment | passed |" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("nosuch",), "no stage nosuch; there are environment,"), (("--wheels", "/no/such"), "no such folder")],
)
def test_bad_calls(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = call(*arguments, folder=tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_models_and_tests_that_it_names_exist() -> None:
    import timm

    import vmamba  # noqa: F401  (registers them)

    scale = Scale()
    assert all(map(timm.is_model, (*scale.models, *scale.larger, *scale.peers)))
    assert all((ROOT / name).exists() for name in scale.tests if "/" in name)
