"""Several processes on a CPU, started by one command."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from images import make_folder, tiny_values


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    values = tiny_values(make_folder(place / "images", each=8))
    small = {"depths": [1, 1], "dims": [16, 32], "stem_stride": 4}
    values["model"] = {"name": "vmamba_pico", "args": small}
    values["augment"] = {"mixup": 0.8, "cutmix": 1.0}
    values["schedule"] = {"epochs": 2, "warmup_epochs": 1}
    values["train"] |= {"batch_size": 8, "ema_decay": 0.9, "accelerator": "cpu"}
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    return place


def train(place: Path, out: str, *overrides: str) -> dict[str, torch.Tensor]:
    """The raw and averaged weights that a run ends with."""
    command = [sys.executable, "-m", "vmamba_cli", "train", "recipe.yaml", "--out", out, *overrides]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: vmamba eval") == 1
    checkpoint = torch.load(place / out / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"]


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, torch.Tensor]:
    return train(place, "alone")


@pytest.mark.parametrize(
    "overrides",
    [["train.devices=2"], ["train.micro_batch_size=2"], ["train.devices=2", "train.micro_batch_size=2"]],
    ids=["two processes", "four passes", "two processes of two passes"],
)
def test_who_shares_a_step_changes_nothing(
    overrides: list[str], place: Path, alone: dict[str, torch.Tensor], request: pytest.FixtureRequest
) -> None:
    shared = train(place, request.node.callspec.id, *overrides)
    assert shared.keys() == alone.keys()
    assert any(name.startswith("ema.") for name in shared)
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
