"""A small model to explore, images, and a running explorer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import vmamba
from vmamba.data.preprocessing import Preprocessing
from vmamba.explorer import Explorer, ExplorerServer, ShownModel
from vmamba.inference import ClassificationPredictor

BLOCK = "stages.0.blocks.1.op"
"""Its maps have 16 rows and 12 columns."""


def small_model(
    name: str = "small", seed: int = 0, size: tuple[int, int] = (64, 48), **args: Any
) -> ShownModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"depths": (2, 1, 1, 1), "dims": (8, 16, 32, 64), "num_classes": 3}
    model = vmamba.VMamba(**{**settings, **args})
    preprocessing = Preprocessing(size=size, crop_pct=1.0, crop_mode="squash")
    classes = [f"class {number}" for number in range(model.num_classes)]
    return ShownModel(name, ClassificationPredictor(model, preprocessing, classes))


def make_images(folder: Path, number: int = 2) -> list[str]:
    """Noise with a bright square in it."""
    paths = []
    for index in range(number):
        pixels = np.random.default_rng(index).integers(0, 120, (80, 60, 3), np.uint8)
        pixels[10 + 20 * index :, 20:40][:16] = 250
        path = folder / f"image {index}.png"
        Image.fromarray(pixels).save(path)
        paths.append(str(path))
    return paths


@contextmanager
def running(explorer: Explorer) -> Iterator[ExplorerServer]:
    """Its server, in a thread."""
    with ExplorerServer(explorer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
            explorer.close()
