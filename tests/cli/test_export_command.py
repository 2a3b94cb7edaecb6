"""`vmamba export` as a user calls it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from images import COLOURS, make_folder
from predicting import Done, call
from vmamba.data.preprocessing import Preprocessing
from vmamba.pretrained import model_config, save_pretrained

pytest.importorskip("onnxscript", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")
CLASSES = sorted(COLOURS)


def save(folder: Path, name: str, **arguments: Any) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(CLASSES), **arguments)
    config = model_config(model, Preprocessing(size=(32, 32)), CLASSES, model_args=arguments)
    save_pretrained(folder, model, config)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, model/, a tiny model of ours, and other/, one without a scan."""
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "photos", each=2)
    save(place / "model", "vmamba_pico", depths=(1,), dims=(8,))
    save(place / "other", "test_resnet")
    return place


def export(place: Path, *arguments: str) -> Done:
    return call(place, "export", *arguments)


def assert_refused(done: Done, message: str) -> None:
    assert done.status == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("vmamba: ")
    assert done.stderr.count("\n") == 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("model", ["model", "other"])
def test_onnx(model: str, place: Path, tmp_path: Path) -> None:
    """Ours, and one without a scan, in a folder that is made."""
    done = export(place, "onnx", model, "--out", str(tmp_path / "new" / "a.onnx"))
    assert done.status == 0, done.stderr
    assert "outputs logits; any batch and height and width" in done.stdout
    assert "differs by at most " in done.stdout
    assert "one image of 32×32, 1 threads: " in done.stdout.replace("2 threads", "1 threads")
    assert names(tmp_path / "new") == ["a.onnx"]


def test_openvino_without_check(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra `export`")
    done = export(place, "openvino", "model", "--out", str(tmp_path / "a.xml"), "--no-check", "--preprocess")
    assert done.status == 0, done.stderr
    assert "outputs probabilities; any batch and height and width" in done.stdout
    assert "differs" not in done.stdout
    assert names(tmp_path) == ["a.bin", "a.xml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["onnx", "vmamba_tinny", "--out", "a.onnx"], "vmamba_tinny"),
        (["onnx", "missing/best.safetensors", "--out", "a.onnx"], "missing/best.safetensors"),
        (["onnx", "model", "--out", "photos"], "photos: a folder; expected the name of a file"),
        (["onnx", "model", "--out", "model/config.json/a.onnx"], "is not a folder"),
        (["openvino", "model", "--out", "a.onnx"], "a.onnx: expected a name that ends in .xml"),
        (["openvino", "model", "--out", "a.xml", "--int8"], "--int8 and --calibration go together"),
        (["openvino", "model", "--out", "a.xml", "--labelled", "photos"], "--labelled: goes with --int8"),
    ],
    ids=["name", "checkpoint", "folder", "file", "xml", "calibration", "labelled"],
)
def test_refused(arguments: list[str], message: str, place: Path) -> None:
    if arguments[0] == "openvino":
        pytest.importorskip("openvino", reason="needs the extra `export`")
    before = names(place)
    assert_refused(export(place, *arguments), message)
    assert names(place) == before


def test_a_missing_runtime(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's is needed; without ONNX Runtime the file is written and not checked."""
    monkeypatch.setattr("vmamba.export.packages.is_installed", lambda package: False)
    monkeypatch.setattr("vmamba.export.writing.is_installed", lambda package: False)
    assert_refused(
        export(place, "openvino", "model", "--out", str(tmp_path / "a.xml")),
        "openvino: not installed; to get it: pip install openvino",
    )
    done = export(place, "onnx", "model", "--out", str(tmp_path / "a.onnx"))
    assert done.status == 0
    assert "not checked: ONNX Runtime is not installed (pip install onnxruntime)" in done.stdout


def test_a_missing_extra(place: Path) -> None:
    code = """
import sys
sys.modules["onnxscript"] = None  # an import of it fails
sys.argv = ["vmamba", "export", "onnx", "model", "--out", "a.onnx"]
from vmamba_cli.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place)
    assert_refused(Done(done.returncode, done.stdout, done.stderr), "to get it: pip install 'vmamba[export]'")


def test_a_full_disk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the extra `export`")

    def half_of_it(model: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", half_of_it)
    done = export(place, "openvino", "model", "--out", str(tmp_path / "a.xml"), "--no-check")
    assert_refused(done, "a.xml: cannot be written: basic_ios::clear: iostream error")
    assert names(tmp_path) == []
