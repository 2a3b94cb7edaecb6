"""Files for other runtimes, of tiny models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vmamba
from vmamba.errors import ExportError, ModelError, OutputError
from vmamba.heads import Features, mask_rcnn, upernet

pytest.importorskip("onnxscript", reason="needs the extra `export`")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra `export`")
export = pytest.importorskip("vmamba.export")

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


VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {"stem": "patch", "downsample": "merge", "mlp_ratio": 0.0, "gate": True, "d_state": 2},
    "cascade": {"routes": "cascade"},
    "unidirectional": {"routes": "unidirectional"},
    "bidirectional": {"routes": "bidirectional"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_and_size_of_images(variant: str, tmp_path: Path) -> None:
    model = micro(**{"depths": (1,), "dims": (8,), **VARIANTS[variant]})
    result = export.onnx(model, tmp_path / "model.onnx", check=False)
    assert result.dynamic == ("batch", "height", "width")
    for size in SIZES:
        images = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            logits = model(images).numpy()
        (values,) = runs(result.path, images)
        assert np.abs(values - logits).max() <= 1e-5 * np.abs(logits).max()


@pytest.mark.slow
def test_maps_of_heads(tmp_path: Path) -> None:
    backbone = Features(micro(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)))
    segmenter = upernet(backbone, 3, channels=8, aux_channels=8).eval()
    detector = mask_rcnn(backbone, channels=8, hidden=8).eval()
    images = torch.randn(2, 3, 96, 70)
    for model, expected in ((segmenter, segmenter), (detector, detector.backbone)):
        result = export.onnx(model, tmp_path / "model.onnx", check=False)
        with torch.inference_mode():
            output = expected(images)
        maps = list(output.values()) if isinstance(output, dict) else [output]
        for value, wanted in zip(runs(result.path, images), maps, strict=True):
            assert np.abs(value - wanted.numpy()).max() <= 1e-5 * wanted.abs().max()


def test_preprocessing_metadata_and_float16(tmp_path: Path) -> None:
    """The check compares the pixels with the predictor's transform."""
    onnx = pytest.importorskip("onnx")
    model = micro(dims=(32, 64))
    full = export.onnx(model, tmp_path / "full.onnx", preprocess=True)
    half = export.onnx(model, tmp_path / "half.onnx", preprocess=True, weights="float16")
    assert full.outputs == ("probabilities",)
    for result in (full, half):
        assert result.check is not None
        assert result.check.difference <= 1e-5
    assert half.megabytes < 0.8 * full.megabytes
    metadata = {entry.key: entry.value for entry in onnx.load(full.path).metadata_props}
    assert json.loads(metadata["vmamba.classes"]) == list("abcde")
    assert json.loads(metadata["vmamba.preprocessing"])["crop_pct"] == 0.9
    assert metadata["vmamba.model"] == "micro"


def test_openvino(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    result = export.openvino(micro(), tmp_path / "model.xml")
    assert result.check is not None
    assert result.check.difference <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_a_wrong_file_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("before")
    monkeypatch.setattr("vmamba.export.check.TOLERANCE", 1e-12)
    with pytest.raises(ExportError, match="gives other numbers than the model"):
        export.onnx(micro(depths=(1,), dims=(8,)), path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_text() == "before"


class Unexportable(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


def lanczos() -> Any:
    model = micro()
    model.pretrained_cfg["interpolation"] = "lanczos"
    return model


@pytest.mark.parametrize(
    ("model", "name", "options", "error", "message"),
    [
        (micro, "file/model.onnx", {}, OutputError, "is not a folder"),
        (micro, ".", {}, OutputError, "a folder; expected the name of a file"),
        (lambda: micro().half(), "m.onnx", {}, ExportError, "expected a model in float32"),
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
        export.openvino(micro(), tmp_path / "model.xml")
