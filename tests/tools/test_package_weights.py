"""The tool that puts a run's weights into the package."""

import json
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import package_weights

from vmamba.errors import CheckpointError, DataError
from vmamba.models.checkpoints import read_checkpoint
from vmamba.train.run import train
from vmamba.train.session import load_recipe

ROOT = Path(__file__).parents[2]
CLASSES = timm.get_pretrained_cfg(package_weights.MODEL).label_names


def make_run(place: Path, *overrides: str, classes: tuple[str, ...] = CLASSES) -> str:
    """A run of one step over two images a class."""
    for split in ("train", "test"):
        with tarfile.open(place / f"{split}.tar", "w") as tar:
            for name in classes:
                for number in range(2):
                    image = place / f"{number}.png"
                    Image.effect_noise((32, 32), 60).convert("RGB").save(image)
                    tar.add(image, f"{split}/{name}/{number}.png")
    settings = [f"data.root={place}", "train.batch_size=20", "train.threads=1"]
    settings += ["schedule.epochs=1", "schedule.warmup_epochs=0", *overrides]
    train(load_recipe(ROOT / "recipes" / "cifar10_nano.yaml", settings), place / "run")
    return str(place / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(tmp_path_factory.mktemp("place"))


def test_the_file(run: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    line = package_weights.package(run, [], path)
    weights, best = read_checkpoint(path), read_checkpoint(run)
    raw = {name.removeprefix("model."): value for name, value in best["state_dict"].items()}
    assert weights.keys() == raw.keys()
    assert all(torch.equal(weight, raw[name].half()) for name, weight in weights.items())
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    assert facts["model"] == "vmamba_pico_wide.cifar10"
    assert facts["judged on"] == "20 test images, the weights rounded to float16"
    assert f"top-1 {float(facts['top1']):.2%} of 20 images" in line
    assert facts["date"] == json.loads(Path(run, "env.json").read_text())["date"][:10]


def test_the_score_is_that_of_the_rounded_weights(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(recipe: str, overrides: list[str]) -> None:
        assert overrides[0] == "train.workers=0"
        weights = read_checkpoint(overrides[1].removeprefix("model.weights="))
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
        raise DataError("no images")

    monkeypatch.setattr(package_weights, "evaluate", evaluate)
    with pytest.raises(DataError, match="no images"):
        package_weights.package(run, ["train.workers=0"], tmp_path / "weights.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"as before")
    monkeypatch.setattr(package_weights, "LARGEST", 1_000_000)
    with pytest.raises(CheckpointError, match=r"3,71\d,\d+ bytes, and the package takes at most 1,000,000"):
        package_weights.package(run, [], path)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(CheckpointError, match="vmamba_pico_wide has other settings"):
        package_weights.package(make_run(other, "model.args={depths: [1, 1, 1]}"), [], path)
    assert path.read_bytes() == b"as before"


def test_a_command_without_the_paths_of_its_machine() -> None:
    command = ["/x/vmamba", "train", "/x/recipes/a.yaml", "data.root=/x", "--out", "/x/run", "optim.lr=1"]
    portable = package_weights._portable(command)
    assert portable == "vmamba train recipes/a.yaml data.root=DIR optim.lr=1"
