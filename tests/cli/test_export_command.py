"""`vmamba export` as a user calls it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import vmamba
from exporting import traced_once
from images import COLOURS, make_folder, tiny_values
from later import Later, importorskip_later
from predicting import Done, call

importorskip_later("onnxscript", "export")
onnxruntime = importorskip_later("onnxruntime", "export")
check = Later("vmamba.export.check")
CLASSES = sorted(COLOURS)
UNTRAINED = ("vmamba_pico", "--untrained")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with photos/ and run/, a training of a tiny model."""
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "photos", each=2)
    values = tiny_values(Path("photos"))
    values["model"] = {"name": "vmamba_pico", "args": {"depths": [1], "dims": [8]}}
    values["schedule"] = {"epochs": 1, "warmup_epochs": 0}
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = call(place, "train", "recipe.yaml", "--out", "run")
    assert done.status == 0, done.stderr
    with traced_once():
        yield place


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


def test_a_run(place: Path, tmp_path: Path) -> None:
    """In a folder that is made."""
    file = tmp_path / "new" / "a.onnx"
    done = export(place, "onnx", "run", "--out", str(file))
    assert done.status == 0, done.stderr
    assert "outputs logits; any batch, height, width" in done.stdout
    assert "differs by at most " in done.stdout
    assert "one image of 32×32, 1 thread: " in done.stdout.replace("2 threads", "1 thread")
    assert names(file.parent) == ["a.onnx"]
    facts = onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map
    assert json.loads(facts["vmamba.classes"]) == CLASSES
    assert facts["vmamba.model"] == "vmamba_pico"
    assert json.loads(facts["vmamba.preprocessing"])["size"] == [32, 32]


def test_openvino_without_check(place: Path, tmp_path: Path) -> None:
    """The file also gives the model's answers once its user has fixed the size of images."""
    pytest.importorskip("openvino", reason="needs the extra `export`")
    done = export(place, "openvino", "run", "--out", str(tmp_path / "a.xml"), "--no-check")
    assert done.status == 0, done.stderr
    assert "outputs logits; any batch, height, width" in done.stdout
    assert "differs" not in done.stdout
    assert names(tmp_path) == ["a.bin", "a.xml"]
    images = torch.randn(2, 3, 40, 33)
    with torch.inference_mode():
        logits = vmamba.load(place / "run", device="cpu").model(images).numpy()
    model = check.openvino_core().read_model(tmp_path / "a.xml")
    for fixed in (False, True):
        if fixed:
            model.reshape(list(images.shape))
        compiled = check.openvino_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert np.abs(compiled([images.numpy()])["logits"] - logits).max() <= 1e-5 * np.abs(logits).max()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["onnx", "vmamba_tinny", "--out", "a.onnx"], "vmamba_tinny"),
        (["onnx", "missing/best.safetensors", "--out", "a.onnx"], "missing/best.safetensors"),
        (["onnx", "vmamba_pico", "--out", "file/a.onnx"], "file is not a folder"),
        (["openvino", "vmamba_pico", "--out", "a.xml", "--int8"], "--int8 and --calibration go together"),
        (
            ["openvino", "vmamba_pico", "--out", "a.xml", "--labelled", "photos"],
            "--labelled: goes with --int8",
        ),
    ],
    ids=["name", "checkpoint", "file", "calibration", "labelled"],
)
def test_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    if arguments[0] == "openvino":
        pytest.importorskip("openvino", reason="needs the extra `export`")
    (tmp_path / "file").touch()
    assert_refused(export(tmp_path, *arguments), message)
    assert names(tmp_path) == ["file"]


def test_a_missing_runtime(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's is needed; without ONNX Runtime the file is written and not checked."""
    monkeypatch.setattr("vmamba.export.packages.is_installed", lambda package: False)
    monkeypatch.setattr("vmamba.export.writing.is_installed", lambda package: False)
    assert_refused(
        export(place, "openvino", "run", "--out", str(tmp_path / "a.xml")),
        "openvino: not installed; to get it: pip install openvino",
    )
    done = export(place, "onnx", "run", "--out", str(tmp_path / "a.onnx"))
    assert done.status == 0
    assert "not checked: ONNX Runtime is not installed (pip install onnxruntime)" in done.stdout


def test_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vmamba.export", "vmamba.export.writing", "vmamba.export.graph"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # an import of it fails
    done = export(tmp_path, "onnx", *UNTRAINED, "--out", "a.onnx")
    assert_refused(done, "to get it: pip install 'vmamba[export]'")


def test_a_full_disk(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the extra `export`")

    def half_of_it(model: Any, path: Path, **options: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(openvino, "save_model", half_of_it)
    done = export(place, "openvino", "run", "--out", str(tmp_path / "a.xml"), "--no-check")
    assert_refused(done, "a.xml: cannot be written: basic_ios::clear: iostream error")
    assert names(tmp_path) == []
