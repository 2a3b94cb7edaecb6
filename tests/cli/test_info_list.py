import json
from importlib.metadata import version

import pytest
import torch
from typer.testing import CliRunner, Result

import vmamba.analysis.complexity
from vmamba.models import model_names
from vmamba_cli.__main__ import app


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_version_and_help() -> None:
    assert call("--version").stdout == f"vmamba {version('vmamba')}\n"
    shown = call("--help").stdout
    assert all(verb in shown for verb in ("train", "eval", "predict", "info", "list", "--debug"))
    assert call("nothing").exit_code == 2


def test_info_of_the_machine() -> None:
    found = json.loads(call("info", "--json").stdout)
    assert found["torch"] == torch.__version__
    assert found["devices"].startswith("cpu (")
    assert found["engines"].keys() == {status.name for status in vmamba.ops.backends()}
    assert found["engines"]["chunked"].startswith("available")
    assert found["engine of choice"]["cpu"] == vmamba.ops.engine_of("cpu")
    assert "reference: available" in call("info").stdout


def test_info_of_a_model() -> None:
    done = call("info", "vmamba_tiny", "--input", "384x512", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["parameters"] == 30_705_832
    assert found["GMACs"] == pytest.approx(4.858 * 384 * 512 / 224**2, rel=2e-3)
    assert found["GMACs, scan as a for-loop"] < found["GMACs"]
    assert found["feature maps"]["stages.3"] == "768 x 12 x 16"
    assert found["settings"]["depths"] == [2, 2, 5, 2]
    assert "device" not in found["settings"]
    assert found["weights"].endswith("vssm_tiny_0230_ckpt_epoch_262.pth")
    assert found["preprocessing"]["interpolation"] == "bicubic"


def test_info_is_not_cut_at_the_terminals_width() -> None:
    done = call("info", "vmamba_tiny")
    assert "4.858" in done.stdout
    assert "/vssm_tiny_0230_ckpt_epoch_262.pth\n" in done.stdout


def test_info_of_another_librarys_model() -> None:
    found = json.loads(call("info", "resnet18", "--json").stdout)
    assert found["GMACs"] == pytest.approx(1.81, rel=1e-2)
    assert "settings" not in found


def test_list() -> None:
    rows = json.loads(call("list", "--json").stdout)
    assert [row["model"] for row in rows] == model_names()
    lines = call("list", "vmamba_tiny*").stdout.splitlines()
    assert len(lines) == 1 + sum(name.startswith("vmamba_tiny") for name in model_names())
    assert lines[1].split() == ["vmamba_tiny", "vmamba_tiny_s2l5", "224", "30,705,832", "4.858", "authors'"]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "vmamba_huge"), "unknown model 'vmamba_huge'; `vmamba list` shows ours"),
        (("info", "vmamba_pico", "--input", "3.5"), "input size '3.5': expected 384 or 512x2048"),
        (("info", "vmamba_pico", "--input", "999999999"), "does not take an input of (3, 999999999,"),
        (("list", "resnet*"), "no model matches 'resnet*'"),
    ],
)
def test_errors_are_one_message(arguments: tuple[str, ...], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("vmamba: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_error_itself() -> None:
    done = call("--debug", "info", "vmamba_huge")
    assert isinstance(done.exception, vmamba.analysis.complexity.ModelError)


def test_a_size_without_a_model_is_refused() -> None:
    done = call("info", "--input", "384")
    assert done.exit_code == 2
    assert "name the model too" in done.stderr
