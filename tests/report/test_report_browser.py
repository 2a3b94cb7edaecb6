"""A report in a real browser."""

from pathlib import Path
from typing import Any

import pytest

from browsers import MARKS, violations
from report.report_places import make_evaluation, make_run
from vmamba.report import read_records, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = MARKS


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report")
    runs = [
        make_run(place / name, classes=1000, name=name)
        for name in ("vmamba_tiny", "vmamba_tiny_s1l8", "test_resnet")
    ]
    make_evaluation(runs[0] / "report", "vmamba_tiny", {"top1": 0.5, "top5": 0.75})
    write_report(read_records(runs), place / "report.html")
    return place / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 400])
def test_it_asks_for_nothing_and_axe_finds_nothing(
    scheme: str, width: int, page_file: Path, browser: Any, axe: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url.partition(",")[0]))
    page.on("console", lambda message: errors.append(message.text))
    page.goto(page_file.as_uri())
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator(".chart").first.is_visible()
    assert set(asked) <= {page_file.as_uri(), "data:image/jpeg;base64", "data:image/png;base64"}
    assert errors == []
    assert violations(page, axe) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


def test_all_of_it_is_printed(page_file: Path, browser: Any) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.emulate_media(media="print")
    playwright.expect(page.locator("pre").first).to_be_visible()
    playwright.expect(page.locator("details .chart").first).to_be_visible()
    page.close()
