"""The tests of a file run in one process, which trains the runs that they share."""

from pathlib import Path

import pytest

from images import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images of three classes, to train on and to judge by."""
    return make_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only runs that a module shares draw their curves, which takes a fourth of a small run's time."""
    monkeypatch.setattr("vmamba.train.callbacks.draw_curves", lambda rows, path: path.write_bytes(b""))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.xdist_group(f"train/{item.path.stem}"))
