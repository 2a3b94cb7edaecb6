"""What the tests of training share."""

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
