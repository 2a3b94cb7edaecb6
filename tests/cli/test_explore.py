import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from typer.testing import CliRunner, Result

from explorer.explored import make_images
from vmamba.data.preprocessing import Preprocessing
from vmamba.explorer import Explorer, ExplorerServer
from vmamba.pretrained import model_config, save_pretrained
from vmamba_cli.__main__ import app

ARGS: dict[str, dict[str, Any]] = {
    "pico": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32]},
    "cascade": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32], "routes": "cascade"},
    "other": {},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models by the names of `ARGS`, images/, broken.png and large.png."""
    place = tmp_path_factory.mktemp("place")
    (place / "images").mkdir()
    make_images(place / "images")
    (place / "broken.png").write_bytes(b"no image")
    Image.new("1", (10_000, 10_000)).save(place / "large.png")
    for name, args in ARGS.items():
        model = timm.create_model("test_resnet" if name == "other" else "vmamba_pico", num_classes=3, **args)
        config = model_config(model, Preprocessing(size=(32, 32)), list("abc"), model_args=args)
        save_pretrained(place / name, model, config)
    return place


def explore(place: Path, *arguments: str) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return CliRunner().invoke(app, ["explore", *arguments])


def test_it_runs_until_ctrl_c(place: Path) -> None:
    command = [sys.executable, "-m", "vmamba_cli", "explore", "images", "--checkpoint", "pico", "--untrained"]
    command += ["--input", "64x48", "--port", "0"]
    with subprocess.Popen(
        command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = line.removesuffix(" (Ctrl-C ends it)\n")
        assert address.startswith("http://127.0.0.1:"), line + process.communicate()[1]
        with urllib.request.urlopen(f"{address}api/state", timeout=120) as answer:
            state = json.load(answer)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert [(model["name"], model["input"]) for model in state["models"]] == [
        ("pico", [64, 48]),
        ("pico, untrained", [64, 48]),
    ]
    assert [image["name"] for image in state["images"]] == ["image 0.png", "image 1.png"]


def test_two_checkpoints(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Explorer] = []
    monkeypatch.setattr(ExplorerServer, "serve_forever", lambda server: shown.append(server.explorer))
    done = explore(place, "--checkpoint", "pico", "--checkpoint", "./pico/best.safetensors", "--port", "0")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("http://127.0.0.1:")
    assert [model.name for model in shown[0].models] == ["pico", "best.safetensors"]


def test_a_model_without_weights_is_shown_untrained(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Explorer] = []
    monkeypatch.setattr(ExplorerServer, "serve_forever", lambda server: shown.append(server.explorer))
    done = explore(place, "--model", "vmamba_pico", "--untrained", "--port", "0")
    assert done.exit_code == 0, done.output
    assert [model.name for model in shown[0].models] == ["vmamba_pico, untrained"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "what? Give --checkpoint RUN, or --model"),
        (("--untrained",), "what? Give --checkpoint RUN, or --model"),
        (
            ("--checkpoint", "pico", "--checkpoint", "pico", "--untrained"),
            "at most two models side by side, got 3",
        ),
        (("none.png", "--checkpoint", "pico"), "none.png: no such image or folder"),
        (("--checkpoint", "none"), "none: no such run or checkpoint"),
        (("--model", "vmamba_pico"), "--untrained takes the model without weights"),
        (("--model", "vmamba_picco", "--untrained"), "vmamba_pico"),
        (("broken.png", "--checkpoint", "pico"), "broken.png: not an image, or a damaged one"),
        (
            ("large.png", "--checkpoint", "pico"),
            "large.png: 10,000 × 10,000 pixels; at most 40 million are taken",
        ),
        (
            ("--checkpoint", "other"),
            "other: nothing to explore, the model has no SS2D that scans whole images",
        ),
        (("--checkpoint", "cascade"), "cascade: nothing to explore"),
        (("--checkpoint", "pico", "--input", "3.5"), "input size '3.5': expected 384 or 512x2048"),
    ],
)
def test_mistakes_are_one_message(arguments: tuple[str, ...], message: str, place: Path) -> None:
    done = explore(place, *arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("vmamba: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_port_in_use(place: Path) -> None:
    with ExplorerServer(Explorer([])) as server:
        done = explore(place, "--checkpoint", "pico", "--port", str(server.server_port))
    assert done.exit_code == 2
    assert done.stderr.startswith(f"vmamba: port {server.server_port} of 127.0.0.1: ")
    assert "Choose another port" in done.stderr
