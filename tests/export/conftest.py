"""Exported files that several tests read; they are made once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from exporting import traced_once


class Files(NamedTuple):
    """A packaged model with preprocessing inside and weights of 16 bits, in both formats."""

    predictor: Any
    onnx: Any
    openvino: Any


@pytest.fixture(scope="session")
def photo_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    import vmamba

    export = pytest.importorskip("vmamba.export")
    pytest.importorskip("openvino", reason="needs the extra `export`")
    folder: Path = tmp_path_factory.mktemp("files")
    predictor = vmamba.load("vmamba_pico_wide", device="cpu")
    with traced_once():
        yield Files(
            predictor,
            export.onnx(predictor, folder / "model.onnx", preprocess=True, weights="float16"),
            export.openvino(predictor, folder / "model.xml", preprocess=True, weights="float16"),
        )
