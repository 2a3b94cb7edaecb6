from pathlib import Path

import pytest

from images import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images of three classes, to train on and to judge by."""
    return make_folder(tmp_path_factory.mktemp("images"))
