"""Files for other runtimes, of tiny models."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vmamba
from exporting import traced_once
from images import make_folder
from later import Later, importorskip_later
from vmamba.errors import DataError, ExportError, ModelError, OutputError
from vmamba.heads import Features, mask_rcnn, upernet

importorskip_later("onnxscript", "export")
onnxruntime = importorskip_later("onnxruntime", "export")
export = Later("vmamba.export")
check = Later("vmamba.export.check")
subjects = Later("vmamba.export.subject")

SIZES = ((1, 33, 40), (2, 96, 160), (3, 224, 224), (1, 384, 288))
CFG = {
    "architecture": "micro",
    "input_size": (3, 64, 64),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.25),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "label_names": list("abcde"),
}


def micro(**settings: Any) -> Any:
    torch.manual_seed(0)
    depths, dims = settings.pop("depths", (1, 1)), settings.pop("dims", (8, 16))
    model = vmamba.VMamba(depths=depths, dims=dims, num_classes=5, **settings).eval()
    model.pretrained_cfg = dict(CFG)
    return model


def runs(path: Path, images: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, {"images": images.numpy()}))


VANILLA = {"stem": "patch", "downsample": "merge", "mlp_ratio": 0.0, "gate": True, "d_state": 2}
OTHER = ["cascade", "unidirectional", "bidirectional", "snake", "window:3"]


def tiny(**settings: Any) -> Any:
    return micro(depths=(1,), dims=(8,), **settings)


@pytest.fixture(scope="module", autouse=True)
def _traced_once() -> Iterator[None]:
    with traced_once():
        yield


def assert_any_size(model: Any, path: Path) -> None:
    result = export.onnx(model, path, check=False)
    assert result.dynamic == ("batch", "height", "width")
    for size in SIZES:
        images = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            logits = model(images).numpy()
        (values,) = runs(result.path, images)
        assert np.abs(values - logits).max() <= 1e-5 * np.abs(logits).max()


def test_any_number_and_size_of_images(tmp_path: Path) -> None:
    assert_any_size(tiny(**VANILLA), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("routes", OTHER)
def test_any_size_along_other_routes(routes: str, tmp_path: Path) -> None:
    model = tiny(routes=routes)
    model.pretrained_cfg["architecture"] = routes  # a name of its own
    assert_any_size(model, tmp_path / "model.onnx")


def maps() -> Any:
    return Features(micro(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)))


@pytest.mark.slow
def test_maps_of_heads(tmp_path: Path) -> None:
    backbone = maps()
    segmenter = upernet(backbone, 3, channels=8, aux_channels=8).eval()
    detector = mask_rcnn(backbone, channels=8, hidden=8).eval()
    images = torch.randn(2, 3, 96, 70)
    for model, expected in ((segmenter, segmenter), (detector, detector.backbone)):
        result = export.onnx(model, tmp_path / "model.onnx", check=False)
        with torch.inference_mode():
            output = expected(images)
        tensors = list(output.values()) if isinstance(output, dict) else [output]
        for value, wanted in zip(runs(result.path, images), tensors, strict=True):
            assert np.abs(value - wanted.numpy()).max() <= 1e-5 * wanted.abs().max()


class OfOneSize(nn.Module):
    """Without a scan, for images of 64²."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(64, 64))
        self.pretrained_cfg = CFG

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images + self.position).amax((2, 3))


class OfPatches(OfOneSize):
    """For images of whole patches of 64²."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        b, c, h, w = images.shape
        return super().forward(images.view(b, c, h // 64, 64, w // 64, 64).mean((2, 4)))


def test_a_model_of_one_size(tmp_path: Path) -> None:
    model = OfOneSize()
    model.pretrained_cfg = {**CFG, "architecture": "of one size"}
    result = export.onnx(model, tmp_path / "model.onnx")
    assert result.dynamic == ("batch",)
    assert result.check.shapes == ((1, 3, 64, 64), (3, 3, 64, 64))


def test_sizes_that_the_model_refuses_are_not_compared() -> None:
    subject = subjects.Subject.of(OfPatches())

    def run(images: Any) -> dict[str, Any]:
        return {"logits": subject.outputs(torch.from_numpy(images))["logits"].numpy()}

    result = check.compare(run, "a runtime", subject, any_size=True)
    assert result.shapes == ((3, 3, 64, 64), (1, 3, 64, 64), (3, 3, 64, 64))


def test_a_wrong_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("before")
    monkeypatch.setattr("vmamba.export.check.TOLERANCE", 1e-12)
    with pytest.raises(ExportError, match="gives other numbers than the model"):
        export.onnx(tiny(**VANILLA), path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "before"


class Unexportable(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def lanczos() -> Any:
    model = tiny()
    model.pretrained_cfg["interpolation"] = "lanczos"
    return model


@pytest.mark.parametrize(
    ("model", "name", "options", "error", "message"),
    [
        (tiny, "file/model.onnx", {}, OutputError, "is not a folder"),
        (tiny, ".", {}, OutputError, "a folder; expected the name of a file"),
        (lambda: tiny().half(), "m.onnx", {}, ExportError, "expected a model in float32"),
        (Unexportable, "m.onnx", {}, ExportError, "Unexportable: PyTorch can't trace it"),
        (lanczos, "m.onnx", {"preprocess": True}, ModelError, "can't hold interpolation 'lanczos'"),
    ],
)
def test_refused(model: Any, name: str, options: Any, error: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        export.onnx(model(), tmp_path / name, **options)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_missing_runtime_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmamba.export.packages.is_installed", lambda package: False)
    with pytest.raises(ExportError, match="pip install openvino"):
        export.openvino(tiny(), tmp_path / "model.xml")


RELEASED = """
import gc, signal, subprocess
import numpy, openvino
from openvino import opset13
from vmamba.export.check import openvino_runner

x = opset13.parameter([-1, 3], numpy.float32)
model = openvino.Model([opset13.relu(x)], [x])
first = openvino_runner(model)
second = openvino_runner(model)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
subprocess.run(["true"], check=True)
"""
"""Two compiled models, freed in the order of their creation, and then a signal that Python handles."""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGCHLD there")
def test_signals_are_handled_after_openvino() -> None:
    pytest.importorskip("openvino", reason="needs the extra `export`")
    done = subprocess.run([sys.executable, "-c", RELEASED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_openvino_wants_xml(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra `export`")
    with pytest.raises(OutputError, match=r"a\.onnx: expected a name that ends in \.xml"):
        export.openvino(tiny(), tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("model", "labelled", "installed", "error", "message"),
    [
        (
            maps,
            "none",
            True,
            ExportError,
            "8 bits are for classifiers",
        ),
        (tiny, "none", True, DataError, "none: no folder with images"),
        (tiny, "photos/val", True, DataError, "no class is named blue, green, red"),
        (tiny, None, False, ExportError, "nncf: not installed; to get it: pip install nncf"),
    ],
    ids=["maps", "no folder", "other classes", "no NNCF"],
)
def test_refused_in_8_bits(
    model: Any,
    labelled: str | None,
    installed: bool,
    error: Any,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the model is traced."""
    monkeypatch.setattr("vmamba.export.graph._translated", None)
    monkeypatch.setattr("vmamba.export.packages.is_installed", lambda name: installed or name != "nncf")
    make_folder(tmp_path / "photos", each=1)
    where = None if labelled is None else tmp_path / labelled
    with pytest.raises(error, match=message):
        export.openvino(model(), tmp_path / "a.xml", calibration=tmp_path / "photos", labelled=where)
    assert [each.name for each in tmp_path.iterdir()] == ["photos"]
