"""What becomes of the first process of a run if another one fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from vmamba.train.launcher import PatientLauncher
from vmamba.train.recipe import Recipe
from vmamba.train.trainer import trainer_for

SCRIPT = """
import os, sys, time
if os.environ.get("LOCAL_RANK", "0") != "0":
    sys.exit(3)
from lightning.fabric.plugins.environments import LightningEnvironment
from vmamba.train import launcher
launcher.GRACE = {grace}
def first():
    time.sleep({seconds})
    print("explained")
launcher.PatientLauncher(LightningEnvironment(), num_processes=2, num_nodes=1).launch(first)
"""


def run(folder: Path, grace: float, seconds: float) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT.format(grace=grace, seconds=seconds))
    return subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)


def test_the_first_process_outlives_another_and_explains(tmp_path: Path) -> None:
    done = run(tmp_path, grace=60, seconds=8)  # Lightning's launcher looks every five seconds
    assert done.returncode == 0, done.stderr
    assert done.stdout == "explained\n"


def test_a_first_process_that_hangs_is_ended(tmp_path: Path) -> None:
    done = run(tmp_path, grace=0.1, seconds=100)
    assert done.returncode == 2, done.stderr
    assert "process 1 of 2 ended with status 3" in done.stderr


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_strategy_starts_processes_so(strategy: str) -> None:
    values = {"task": "classification", "model": {"name": "vmamba_pico"}}
    train = {"devices": 2, "strategy": strategy, "accelerator": "cpu"}
    trainer = trainer_for(Recipe.model_validate({**values, "train": train}), [])
    assert isinstance(trainer.strategy.launcher, PatientLauncher)
