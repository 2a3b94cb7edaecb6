"""Small image folders, and a recipe that trains on one in a second."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

COLOURS = {"blue": (40, 40, 220), "green": (40, 220, 40), "red": (220, 40, 40)}


def make_folder(root: Path, each: int = 6) -> Path:
    """`root/{train,val}/<colour>/<n>.png`: 20×16 noise around the colour that names the class."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(each):
                pixels = np.clip(random.normal(colour, 40, (16, 20, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def tiny_values(root: Path) -> dict[str, Any]:
    """A recipe with everything random on: Mixup, augmentation, drop path."""
    return {
        "task": "classification",
        "model": {"name": "test_convnext", "args": {"drop_path_rate": 0.5, "depths": [1, 1, 1, 1]}},
        "data": {"root": str(root), "image_size": 32},
        "augment": {"mixup": 0.5},
        "optim": {"lr": 2e-3},
        "schedule": {"epochs": 3, "warmup_epochs": 1},
        "train": {"batch_size": 4, "workers": 0, "threads": 1},
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same weights, to the last bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
