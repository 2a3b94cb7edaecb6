"""The page in a real browser."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from browsers import MARKS, violations
from explorer.explored import BLOCK, make_images, running, small_model
from vmamba.analysis.attention import scan_attention
from vmamba.errors import DataError
from vmamba.explorer import Explorer, ExplorerServer
from vmamba.ops.routes import register_route

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
playwright.expect.set_options(timeout=60_000)  # milliseconds: the machine may be busy
pytestmark = MARKS


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExplorerServer]:
    images = make_images(tmp_path_factory.mktemp("images"))
    models = [small_model("one"), small_model("two", seed=1)]
    with running(Explorer(models, images)) as server:
        yield server


class Visit:
    """A page that is open, with the addresses it asked for and what went wrong in it."""

    def __init__(self, page: Any, server: ExplorerServer) -> None:
        self.page, self.server = page, server
        self.asked: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console", lambda message: self.errors.append(message.text) if message.type == "error" else None
        )

    def open(self, fragment: str = "") -> None:
        self.page.goto(f"{self.server.address}{fragment}")
        self.page.locator("canvas").nth(9).wait_for()

    def expect(self, selector: str, text: str) -> None:
        playwright.expect(self.page.locator(selector).first).to_have_text(text)

    def at(self, row: int, column: int) -> None:
        """Wait until both models show the maps of a patch, counted from 1."""
        for number in (0, 1):
            where = self.page.locator(".where").nth(number)
            playwright.expect(where).to_have_text(f"patch in row {row} of 16, column {column} of 12")

    def maps(self, model: int) -> np.ndarray:
        """The values that a model's canvases show: the merged map, then each route's."""
        script = """number => Array.from(
            document.querySelectorAll(".model")[number].querySelectorAll("canvas"),
            canvas => Array.from(canvas.values, value => Number.isNaN(value) ? null : value))"""
        return np.array(self.page.evaluate(script, model), dtype=float).reshape(-1, 16, 12)


@pytest.fixture
def visit(browser: Any, server: ExplorerServer) -> Iterator[Visit]:
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.set_default_timeout(60_000)
    visit = Visit(page, server)
    yield visit
    page.close()
    assert visit.errors == []
    assert visit.asked
    assert all(address.startswith((server.address, f"blob:{server.address}")) for address in visit.asked)


def analysis(
    server: ExplorerServer, model: int, position: int, kind: str = "CwBw", delta: bool = False
) -> np.ndarray:
    """The library's rows for the first image: their sum, then each route's, NaN where it has not been."""
    shown = server.explorer.models[model]
    path = server.explorer.images._paths["0"]
    image = shown.preprocessing.transform()(shown.preprocessing.read(path))
    attention = scan_attention(shown.predictor.model, image, module=BLOCK)
    row = attention.row(position, kind, delta)
    routes = row.where(attention.reached(position), np.nan).numpy()
    return np.concatenate([row.sum(0, keepdim=True).numpy(), routes])


def assert_shows(visit: Visit, row: int, column: int, **options: Any) -> None:
    visit.at(row + 1, column + 1)
    for model in (0, 1):
        expected = analysis(visit.server, model, row * 12 + column, **options)
        for _ in range(600):
            if np.allclose(visit.maps(model), expected, rtol=0, atol=1e-6, equal_nan=True):
                break
            visit.page.wait_for_timeout(100)  # the answer is still on its way
        np.testing.assert_allclose(visit.maps(model), expected, rtol=0, atol=1e-6)


CHOSEN = f"#block={BLOCK}&block={BLOCK}"


def test_the_pointer_clicks_and_arrow_keys_show_the_analysis(visit: Visit) -> None:
    visit.open(CHOSEN)
    assert_shows(visit, 8, 6)
    grid = visit.page.locator(".patches").first
    assert grid.get_by_role("gridcell").count() == 16 * 12
    cell = grid.get_by_role("gridcell", name="row 3, column 11", exact=True)
    cell.hover()
    assert_shows(visit, 2, 10)
    visit.page.mouse.move(2, 2)
    assert_shows(visit, 8, 6)
    cell.click()
    visit.page.mouse.move(2, 2)
    assert_shows(visit, 2, 10)
    for key, place in {
        "ArrowDown": (3, 10),
        "ArrowRight": (3, 11),
        "ArrowUp": (2, 11),
        "ArrowLeft": (2, 10),
        "Home": (2, 0),
        "Control+End": (15, 11),
    }.items():
        visit.page.keyboard.press(key)
        assert_shows(visit, *place)
    visit.page.keyboard.press("ArrowRight")  # there is nothing beyond the border
    assert_shows(visit, 15, 11)
    assert visit.page.evaluate("document.activeElement.ariaLabel") == "row 16, column 12"


def test_the_patches_are_one_stop_of_tab(visit: Visit) -> None:
    visit.open(CHOSEN)
    visit.at(9, 7)
    visit.page.locator(".block").first.focus()
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.ariaLabel") == "row 9, column 7"
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.role") != "gridcell"


def test_kinds_delta_and_the_address(visit: Visit) -> None:
    visit.open(f"{CHOSEN}&map=CB&at=0.1,0.3")
    assert_shows(visit, 4, 1, kind="CB")
    visit.page.get_by_label("the decay alone").check()
    visit.page.get_by_label("times δ").check()
    assert_shows(visit, 4, 1, kind="ww", delta=True)
    address = visit.page.url
    visit.page.get_by_label("times δ").uncheck()
    visit.page.goto(address)
    visit.page.reload()
    visit.page.locator("canvas").nth(9).wait_for()
    assert_shows(visit, 4, 1, kind="ww", delta=True)
    assert visit.page.get_by_label("times δ").is_checked()


def test_another_block_has_other_patches(visit: Visit) -> None:
    visit.open(CHOSEN)
    visit.page.locator(".block").first.select_option("stages.2.blocks.0.op")
    for number in (0, 1):
        where = visit.page.locator(".where").nth(number)
        playwright.expect(where).to_have_text("patch in row 3 of 4, column 2 of 3")
    assert visit.page.locator(".patches").first.get_by_role("gridcell").count() == 12


def test_maps_in_words(visit: Visit) -> None:
    visit.open(CHOSEN)
    visit.at(9, 7)
    values = visit.maps(0)
    caption = visit.page.locator("figcaption p").nth(1).inner_text()
    assert caption.startswith("has visited 103 of 192 patches; from ")
    row, column = np.unravel_index(np.nanargmax(values[1]), (16, 12))
    assert caption.endswith(f"most from row {row + 1}, column {column + 1}")
    assert visit.page.locator("canvas").nth(1).get_attribute("aria-label") == f"route 1: row: {caption}"
    visit.page.locator("details").first.click()
    first = visit.page.locator("details li").first
    row, column = np.unravel_index(values[0].argmax(), (16, 12))
    playwright.expect(first).to_contain_text(f"row {row + 1}, column {column + 1}: ")
    assert visit.page.locator("details").first.locator("li").count() == 10
    playwright.expect(visit.page.locator("#told")).to_contain_text(
        "one, patch in row 9 of 16, column 7 of 12: from"
    )


def test_a_cell_of_a_fine_map_stands_for_several_patches(browser: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    with running(Explorer([small_model(size=(288, 320))], make_images(tmp_path))) as server:
        page.goto(f"{server.address}#block={BLOCK}&at=0,0")
        where, cells = page.locator(".where"), page.get_by_role("gridcell")
        playwright.expect(where).to_have_text("patch in row 1 of 72, column 1 of 80")
        assert cells.count() == 36 * 40
        cells.last.hover()
        playwright.expect(where).to_have_text("patch in row 72 of 72, column 80 of 80")
        page.get_by_role("gridcell", name="row 4, column 6", exact=True).click()
        page.keyboard.press("ArrowUp")
        page.mouse.move(2, 2)
        playwright.expect(where).to_have_text("patch in row 2 of 72, column 6 of 80")
    page.close()


@pytest.mark.filterwarnings("ignore::vmamba.ops.BackendWarning")
def test_routes_of_any_name(browser: Any, tmp_path: Path) -> None:
    register_route("zick, zack – ß", lambda height, width: torch.arange(height * width).flip(0))
    page = browser.new_page()
    model = small_model(routes=("row", "zick, zack – ß"))
    with running(Explorer([model], make_images(tmp_path))) as server:
        page.goto(server.address)
        playwright.expect(page.locator("figure h3").nth(2)).to_have_text("route 2: zick, zack – ß")
    page.close()


def test_a_prediction_that_fails_leaves_the_maps(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: int, image: str) -> None:
        raise DataError("the model's outputs are NaN or infinite")

    monkeypatch.setattr(visit.server.explorer, "prediction", fail)
    visit.open(CHOSEN)
    assert_shows(visit, 8, 6)
    visit.expect(".prediction li", "the model's outputs are NaN or infinite")
    assert all("400" in error for error in visit.errors)
    visit.errors.clear()


def test_the_receptive_field(visit: Visit) -> None:
    visit.open(CHOSEN)
    box = visit.page.get_by_role("checkbox", name="receptive field")
    box.check()
    figure = visit.page.locator(".model").first.locator("figure", has_text="receptive field")
    playwright.expect(figure.locator("p")).to_contain_text("half of the contribution comes from")
    values = figure.locator("canvas").evaluate("canvas => Array.from(canvas.values)")
    expected = visit.server.explorer.field(0, "0", (6.5 / 12, 8.5 / 16))
    np.testing.assert_allclose(values, expected.flatten().numpy(), atol=1e-6)
    box.uncheck()
    playwright.expect(figure).to_have_count(0)


def png(size: tuple[int, int], mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, "PNG")
    return file.getvalue()


def test_uploads(visit: Visit) -> None:
    visit.open(CHOSEN)
    page, message = visit.page, visit.page.locator("#message")

    def add(name: str, content: bytes) -> None:
        page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})

    add("mine.png", png((90, 70)))
    playwright.expect(page.locator("#image option:checked")).to_have_text("mine.png")
    playwright.expect(message).to_have_text("")
    expected = visit.server.explorer.prediction(0, page.locator("#image").input_value())["classes"][0]
    playwright.expect(page.locator(".prediction li").first).to_contain_text(expected["label"])
    page.reload()
    playwright.expect(page.locator("#image option:checked")).to_have_text("mine.png")
    assert visit.errors == []
    add("many pixels.png", png((10_000, 10_000), "1"))
    playwright.expect(message).to_have_text(
        "many pixels.png: 10,000 × 10,000 pixels; at most 40 million are taken, make it smaller"
    )
    add("broken.png", b"no image")
    playwright.expect(message).to_contain_text("broken.png: not an image, or a damaged one; expected JPEG")
    add("huge.png", b"x" * (21 * 2**20))
    playwright.expect(message).to_have_text("huge.png: 21.0 MiB, and at most 20.0 MiB are taken")
    refused = [error for error in visit.errors if "400" in error]
    assert len(refused) == 2
    assert visit.errors == refused  # the browser's own words for an answer of 400
    visit.errors.clear()
    add("other.png", png((30, 30)))
    playwright.expect(message).to_have_text("")


def test_an_image_is_dropped_onto_the_page(visit: Visit) -> None:
    visit.open(CHOSEN)
    dropped = visit.page.evaluate_handle(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            return data;
        }""",
        list(png((50, 40))),
    )
    visit.page.dispatch_event("body", "drop", {"dataTransfer": dropped})
    playwright.expect(visit.page.locator("#image option:checked")).to_have_text("dropped.png")


def test_an_address_of_an_image_that_is_gone(visit: Visit) -> None:
    visit.page.goto(f"{visit.server.address}#image=0123456789abcdef")
    playwright.expect(visit.page.locator("#message")).to_contain_text(
        "there is no image '0123456789abcdef' any more"
    )
    visit.page.locator("#image").select_option(label="image 1.png")
    playwright.expect(visit.page.locator("#message")).to_have_text("")
    visit.page.locator("canvas").nth(9).wait_for()
    assert all("404" in error for error in visit.errors)
    visit.errors.clear()


def test_without_an_image(browser: Any) -> None:
    page = browser.new_page()
    with running(Explorer([small_model()])) as server:
        page.goto(server.address)
        playwright.expect(page.locator("#message")).to_have_text(
            "Drop an image onto the page, or add one above."
        )
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": png((30, 30))})
        page.locator("canvas").nth(4).wait_for()
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 400])
def test_axe_finds_nothing(scheme: str, width: int, visit: Visit, axe: str) -> None:
    visit.page.emulate_media(color_scheme=scheme)
    visit.page.set_viewport_size({"width": width, "height": 900})
    visit.open(f"{CHOSEN}&field=1&over=1")
    visit.page.locator("canvas").nth(11).wait_for()
    visit.page.locator("details").first.click()
    assert violations(visit.page, axe) == []
    assert visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
