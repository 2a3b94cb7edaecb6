"""The weights that come with the package: every way to them reads a file, and none asks a network."""

import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

import vmamba
from vmamba.errors import CheckpointError
from vmamba.models.checkpoints import read_checkpoint
from vmamba.models.factory import create_model
from vmamba_cli import _explore
from vmamba_cli.__main__ import app

NAME = "vmamba_pico_wide"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FILE = Path(timm.get_pretrained_cfg(NAME).file)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError(f"it asked a network: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    Image.effect_noise((40, 32), 80).save(path)
    return str(path)


def facts() -> dict[str, str]:
    with safe_open(FILE, framework="pt") as file:
        return file.metadata()


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_file() -> None:
    assert FILE.is_relative_to(Path(vmamba.__file__).parent)
    assert FILE.stat().st_size <= 4_000_000
    weights = read_checkpoint(FILE)  # which compares the digest inside
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert facts()["classes"].split(", ") == CLASSES
    assert 0 < float(facts()["top1"]) <= 1


@pytest.mark.parametrize("name", [NAME, f"{NAME}.cifar10"])
def test_a_model_in_float32_with_them(name: str) -> None:
    model = timm.create_model(name, pretrained=True)
    assert (model.num_classes, list(model.pretrained_cfg["label_names"])) == (10, CLASSES)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for key, weight in read_checkpoint(FILE).items():
        assert torch.equal(model.state_dict()[key], weight.float()), key


def test_other_classes_and_channels() -> None:
    whole = timm.create_model(NAME, pretrained=True)
    model = timm.create_model(f"{NAME}.cifar10", pretrained=True, num_classes=5, in_chans=1)
    assert model(torch.randn(2, 1, 32, 48)).shape == (2, 5)
    assert torch.equal(model.stages[2].blocks[1].op.A_log, whole.stages[2].blocks[1].op.A_log)
    expected = whole.stem.conv1.weight.sum(1, keepdim=True).half().float()  # timm keeps the file's type
    torch.testing.assert_close(model.stem.conv1.weight, expected)


def test_features() -> None:
    features = timm.create_model(NAME, pretrained=True, features_only=True).eval()
    images = torch.randn(1, 3, 32, 48)
    maps = features(images)
    assert [tuple(each.shape[1:]) for each in maps] == [(64, 16, 24), (128, 8, 12), (256, 4, 6)]
    whole = timm.create_model(NAME, pretrained=True).eval()
    torch.testing.assert_close(maps[-1], whole.forward_intermediates(images, intermediates_only=True)[-1])


def test_a_predictor_knows_the_classes(image: str) -> None:
    predictor = vmamba.load(NAME, device="cpu")
    assert predictor.classes == CLASSES
    assert predictor.preprocessing.size == (32, 32)
    assert predictor(image).classes[0].label in CLASSES
    assert vmamba.load(NAME, device="cpu", classes=list("abcdefghij")).classes == list("abcdefghij")
    untrained = vmamba.load(NAME, device="cpu", trained=False)
    assert untrained.classes == CLASSES
    assert not torch.equal(untrained.model.head.fc.weight, predictor.model.head.fc.weight)


def test_as_right_as_their_file_says() -> None:
    """On the first twenty test images of CIFAR-10, within three standard deviations."""
    package = importlib.util.find_spec("foolbox")
    if package is None or package.origin is None:
        pytest.skip("the images come with the package foolbox, which is missing")
    paths = sorted(Path(package.origin).with_name("data").glob("cifar10_*.png"))
    assert len(paths) == 20
    predictions = vmamba.load(NAME, device="cpu")(paths)
    right = sum(
        prediction.classes[0].label == CLASSES[int(path.stem.rpartition("_")[2])]
        for path, prediction in zip(paths, predictions, strict=True)
    )
    top1 = float(facts()["top1"])
    assert right >= 20 * top1 - 3 * (20 * top1 * (1 - top1)) ** 0.5


def test_commands(image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (row,) = json.loads(call("predict", image, "--model", NAME, "--json"))
    assert {each["label"] for each in row["classes"]} <= set(CLASSES)
    call("analyze", "erf", image, "--model", NAME)
    areas = json.loads(Path("analysis/erf.json").read_text())["results"]
    assert {each["trained"] for each in areas} == {True, False}
    assert call("info", NAME).count(str(FILE)) == 1
    assert call("list", NAME).splitlines()[1].endswith("in the package")
    shown = []
    monkeypatch.setattr(_explore, "serve", lambda models, images, port: shown.extend(models))
    call("explore", image, "--model", NAME, "--untrained")
    assert [each.name for each in shown] == [NAME, f"{NAME}, untrained"]


def test_a_file_that_is_missing() -> None:
    overlay = {"file": "nowhere.safetensors"}
    with pytest.raises(
        CheckpointError, match=r"weights of vmamba_pico_wide cannot be had, .* FileNotFoundError"
    ):
        create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
