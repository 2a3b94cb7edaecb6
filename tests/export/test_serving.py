"""The examples that serve an exported model: in a Python without PyTorch, and in a browser."""

import functools
import http.server
import importlib.util
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

import vmamba
from browsers import MARKS, npm_files, violations
from distributions import link_distributions, needed
from exporting import traced_once

onnx = pytest.importorskip("onnx", reason="needs the extra `export`")
for package in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason="needs the extra `export`")
export = pytest.importorskip("vmamba.export")
EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGE = "onnxruntime-web@1.30.0"
DIST = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def in_a_browser(test: Any) -> Any:
    """Skip a test where Chromium or playwright is missing."""
    missing = importlib.util.find_spec("playwright") is None
    for mark in (*MARKS, pytest.mark.skipif(missing, reason="needs playwright")):
        test = mark(test)
    return test


class Files(NamedTuple):
    """A packaged model with preprocessing inside and weights of 16 bits, in both formats."""

    predictor: Any
    onnx: Any
    openvino: Any


@pytest.fixture(scope="module")
def photo_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    folder: Path = tmp_path_factory.mktemp("files")
    predictor = vmamba.load("vmamba_pico_wide", device="cpu")
    with traced_once():
        yield Files(
            predictor,
            export.onnx(predictor, folder / "model.onnx", preprocess=True, weights="float16"),
            export.openvino(predictor, folder / "model.xml", preprocess=True, weights="float16"),
        )


def test_preprocessing_metadata_and_float16(photo_files: Any) -> None:
    """The check compares the pixels with the predictor's transform."""
    predictor = photo_files.predictor
    for result in (photo_files.onnx, photo_files.openvino):
        assert result.outputs == ("probabilities",)
        assert result.check.difference <= 1e-5
    parameters = sum(parameter.numel() for parameter in predictor.model.parameters())
    assert 2 * parameters < 1e6 * photo_files.onnx.megabytes < 3 * parameters
    metadata = {entry.key: entry.value for entry in onnx.load(photo_files.onnx.path).metadata_props}
    assert json.loads(metadata["vmamba.classes"]) == list(predictor.classes)
    assert json.loads(metadata["vmamba.preprocessing"]) == predictor.preprocessing.to_dict()
    assert metadata["vmamba.model"] == "vmamba_pico_wide"


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


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the example."""
    return Path(
        shutil.copytree(
            EXAMPLES / "web", tmp_path / "web", ignore=shutil.ignore_patterns("node_modules", "*.onnx")
        )
    )


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@in_a_browser
def test_it_says_what_is_missing(browser: Any, address: str) -> None:
    expect = importlib.import_module("playwright.sync_api").expect
    page = browser.new_page()
    page.goto(address)
    expect(page.locator("#answer")).to_contain_text("A file is missing, see below")
    expect(page.locator("pre")).to_contain_text(f"npm install --no-save {PACKAGE}")
    assert page.locator("#file").is_disabled()
    page.close()


@in_a_browser
def test_a_picked_image(
    browser: Any, address: str, folder: Path, photo_files: Any, axe: str, tmp_path: Path
) -> None:
    dist = folder / "node_modules" / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    for name, content in npm_files(PACKAGE, [f"package/dist/{name}" for name in DIST]).items():
        (dist / Path(name).name).write_bytes(content)
    shutil.copy(photo_files.onnx.path, folder / "model.onnx")
    photo = tmp_path / "photo.png"
    spec = importlib.util.find_spec("foolbox")
    if spec is None:
        pytest.skip("needs foolbox, whose photographs it classifies")
    source = sorted((Path(spec.origin).parent / "data").glob("cifar10_*"))[0]
    Image.open(source).convert("RGB").save(photo)

    expect = importlib.import_module("playwright.sync_api").expect
    page = browser.new_page()
    page.goto(address)
    answer = page.locator("#answer")
    expect(answer).to_have_text("Pick an image.", timeout=60_000)
    page.set_input_files("#file", photo)
    expected = photo_files.predictor(photo, top=3).classes
    expect(answer).to_have_text(
        ", ".join(f"{each.label} {each.score:.1%}" for each in expected), timeout=60_000
    )
    assert violations(page, axe) == []
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "text.png")
    expect(answer).to_contain_text("This file can't be classified")
    page.close()
