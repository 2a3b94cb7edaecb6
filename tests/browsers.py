"""A Chromium of the system's, driven by playwright, and axe-core, which judges a page's accessibility.

Tests that use them are skipped where playwright or Chromium is missing. What comes from
npm is fetched once and kept in .cache.
"""

import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]

AXE = "axe-core@4.14.1"
CACHE = Path(__file__).parents[1] / ".cache"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import expect, sync_playwright  # the tests are skipped where it is missing

    expect.set_options(timeout=60_000)  # a busy machine is slow
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core's script, from npm."""
    (script,) = npm_files(AXE, ["package/axe.min.js"]).values()
    return script.decode()


def npm_files(package: str, names: Sequence[str]) -> dict[str, bytes]:
    """Files of an npm package, name@version, which is fetched once and kept in .cache."""
    archive = CACHE / f"{package.replace('@', '-')}.tgz"
    if not archive.is_file():
        if shutil.which("npm") is None:
            pytest.skip(f"needs npm, which fetches {package}")
        CACHE.mkdir(exist_ok=True)
        done = subprocess.run(
            ["npm", "pack", package], cwd=CACHE, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            pytest.skip(f"npm cannot fetch {package}: {done.stderr.strip()[-200:]}")
    with tarfile.open(archive) as files:
        members = {name: files.extractfile(name) for name in names}
        return {name: member.read() for name, member in members.items() if member is not None}


def violations(page: Any, axe: str) -> list[Any]:
    """What axe-core finds: each rule, and the first elements that break it."""
    page.evaluate(axe)
    results = page.evaluate("axe.run()")["violations"]
    return [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in results]
