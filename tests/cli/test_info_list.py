import json
import subprocess
import sys
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
    facts = json.loads(call("info", "--json").stdout)
    assert facts["torch"] == torch.__version__
    assert facts["devices"].startswith("cpu (")
    assert facts["backends"].keys() == {status.name for status in vmamba.ops.backends()}
    assert facts["backends"]["chunked"].startswith("available")
    assert facts["backend of choice"]["cpu"] == vmamba.ops.default_backend("cpu")
    assert "reference: available" in call("info").stdout


def test_info_of_a_model() -> None:
    done = call("info", "vmamba_tiny", "--input", "384x512", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["parameters"] == 30_705_832
    assert facts["GMACs"] == pytest.approx(4.858 * 384 * 512 / 224**2, rel=2e-3)
    assert facts["GMACs, scan as a for-loop"] < facts["GMACs"]
    assert facts["feature maps"]["stages.3"] == "768 x 12 x 16"
    assert facts["scans"]["5 of 24 x 32, 768 channels"] == (
        "state size 1, rank of delta 24, routes row column row_reversed column_reversed"
    )
    assert facts["weights"].endswith("vssm_tiny_0230_ckpt_epoch_262.pth")
    assert facts["preprocessing"]["interpolation"] == "bicubic"


def test_info_of_a_model_with_several_scans_of_one_size() -> None:
    done = call("info", "vim_tiny", "--json")
    assert done.exit_code == 0, done.output
    (scans,) = json.loads(done.stdout)["scans"].values()
    assert [scan.partition("routes ")[2] for scan in scans.split("; ")] == ["row", "row_reversed"]


def test_info_shows_the_settings_of_a_model_that_keeps_them() -> None:
    facts = json.loads(call("info", "vmamba_pico", "--json").stdout)
    assert facts["settings"]["depths"] == [1, 2, 4, 1]
    assert "device" not in facts["settings"]


def test_info_is_not_cut_at_the_terminals_width() -> None:
    done = call("info", "vmamba_tiny")
    assert "4.858" in done.stdout
    assert "/vssm_tiny_0230_ckpt_epoch_262.pth\n" in done.stdout


def test_info_of_another_librarys_model() -> None:
    facts = json.loads(call("info", "resnet18", "--json").stdout)
    assert facts["GMACs"] == pytest.approx(1.81, rel=1e-2)
    assert "settings" not in facts
    assert not any("scan" in name for name in facts)


def test_list() -> None:
    rows = json.loads(call("list", "--json").stdout)
    assert [row["model"] for row in rows] == model_names()
    assert rows[0].keys() == {"model", "same as", "input", "parameters", "GMACs", "weights"}
    lines = call("list", "vmamba_tiny*").stdout.splitlines()
    assert len(lines) == 1 + sum(row["model"].startswith("vmamba_tiny") for row in rows)
    assert lines[1].split() == ["vmamba_tiny", "vmamba_tiny_s2l5", "224", "30,705,832", "4.858", "authors'"]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("word", ["tiny", "Tiny", "*tiny*"])
def test_list_by_a_word_in_the_names(word: str) -> None:
    rows = json.loads(call("list", word, "--json").stdout)
    assert [row["model"] for row in rows] == [name for name in model_names() if "tiny" in name]
    assert call("list", "tiny*").exit_code == 2  # a pattern is of the whole name


def test_list_imports_neither_torch_nor_the_library() -> None:
    code = """
import sys
sys.argv = ["vmamba", "list"]
from vmamba_cli.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code
print("LOADED", [m for m in ("torch", "timm", "vmamba", "numpy") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "vmamba_huge"), "unknown model 'vmamba_huge'; did you mean vmamba_"),
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
