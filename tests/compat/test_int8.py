"""8 bits by NNCF, which needs the extra `int8`."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from images import make_folder
from later import Later, importorskip_later

importorskip_later("onnxscript", "export")
importorskip_later("openvino", "export")
importorskip_later("nncf", "int8")
export = Later("vmamba.export")
check = Later("vmamba.export.check")
pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("default")]


def test_images_of_other_sizes_than_the_calibration(tmp_path: Path) -> None:
    """NNCF would tie the ranges of depthwise convolutions to rows of the calibration images."""
    photos = make_folder(tmp_path / "photos", each=4)
    torch.manual_seed(0)
    model = timm.create_model("vmamba_pico", depths=(1,), dims=(16,), num_classes=3).eval()
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ["blue", "green", "red"]}
    result = export.openvino(
        model, tmp_path / "a.xml", calibration=photos / "train", labelled=photos / "val", check=False
    )
    assert result.quantised.images == 12
    assert result.quantised.labelled == 12
    compiled = check.openvino_core().compile_model(result.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in ((1, 3, 33, 40), (2, 3, 64, 64), (3, 3, 96, 50)):
        images = torch.randn(size)
        with torch.inference_mode():
            logits = model(images).numpy()
        (values,) = compiled([images.numpy()]).values()
        assert values.shape == logits.shape
        assert np.abs(values - logits).max() <= 0.1 * np.abs(logits).max()
