"""The example page that classifies in a browser, with onnxruntime-web from npm."""

import functools
import http.server
import importlib.util
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browsers import CHROMIUM, npm_files, violations

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("onnxscript", reason="needs the extra `export`")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.xdist_group("export"),  # one process writes the files
]
PAGE = Path(__file__).parents[2] / "examples" / "web"
PACKAGE = "onnxruntime-web@1.30.0"
DIST = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the example."""
    return Path(
        shutil.copytree(PAGE, tmp_path / "web", ignore=shutil.ignore_patterns("node_modules", "*.onnx"))
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


def test_it_says_what_is_missing(browser: Any, address: str) -> None:
    page = browser.new_page()
    page.goto(address)
    playwright.expect(page.locator("#answer")).to_contain_text("A file is missing, see below")
    playwright.expect(page.locator("pre")).to_contain_text(f"npm install --no-save {PACKAGE}")
    assert page.locator("#file").is_disabled()
    page.close()


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

    page = browser.new_page()
    page.goto(address)
    answer = page.locator("#answer")
    playwright.expect(answer).to_have_text("Pick an image.", timeout=60_000)
    page.set_input_files("#file", photo)
    expected = photo_files.predictor(photo, top=3).classes
    playwright.expect(answer).to_have_text(
        ", ".join(f"{each.label} {each.score:.1%}" for each in expected), timeout=60_000
    )
    assert violations(page, axe) == []
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "text.png")
    playwright.expect(answer).to_contain_text("This file can't be classified")
    page.close()
