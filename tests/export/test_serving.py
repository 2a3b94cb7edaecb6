"""The examples that serve an exported model, in a Python that has no PyTorch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distributions import link_distributions, needed

pytest.importorskip("onnxscript", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")
pytestmark = pytest.mark.xdist_group("export")  # one process writes the files
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_without_pytorch(runtime: str, photo_files: Any, tmp_path: Path) -> None:
    predictor = photo_files.predictor
    file = (photo_files.onnx if runtime == "onnxruntime" else photo_files.openvino).path
    photos = [tmp_path / "wide.png", tmp_path / "high.png"]
    for photo, size in zip(photos, ((40, 61), (90, 57)), strict=True):
        pixels = np.random.default_rng(0).integers(256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(photo)
    packages = tmp_path / "packages"
    packages.mkdir()
    link_distributions(needed(runtime, "pillow", "numpy"), packages)
    code = f"""
import importlib.util, runpy, sys
sys.path.append({str(packages)!r})
assert importlib.util.find_spec("torch") is None
sys.argv = {["serve", str(file), *map(str, photos)]}
runpy.run_path({str(EXAMPLES / f"serve_{runtime}.py")!r})
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [
        f"{photo}: " + ", ".join(f"{each.label} {each.score:.1%}" for each in predictor(photo, top=3).classes)
        for photo in photos
    ]
    assert done.stdout.splitlines() == expected
