"""Kill a training run with SIGKILL repeatedly, and check that it ends with the same weights.

    python benchmarks/faults/kill.py --kills 20 --out benchmarks/results/faults

A small model is trained on generated images, with Mixup, drop path, an average of the weights, data workers
and a checkpoint every third step: once without interruption; then once for each kill, with 0 to 2 workers,
killed at a random moment of a random step and started again by the same command, with another number of
workers. Raw and averaged weights, the optimiser's state and metrics.csv (except its speed) must be the same
to the last bit. The kill comes up to 150 ms after the step begins: in forward, backward, update, evaluation,
or while a checkpoint is written.

`--processes 2` splits each step between two processes, of which the first is killed.
"""

import argparse
import csv
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

EPOCHS, STEPS = 3, 8  # an epoch: 64 images in batches of 8


def make_folder(root: Path) -> None:
    """64 images to train on and 20 to judge by, of noise around a colour a class."""
    draw = np.random.default_rng(0)
    for split, each in (("train", 16), ("val", 5)):
        for number, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200), (180, 180, 60))):
            folder = root / split / f"class_{number}"
            folder.mkdir(parents=True)
            for image in range(each):
                pixels = np.clip(draw.normal(colour, 50, (36, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{image}.png")


def recipe(images: Path) -> dict[str, Any]:
    return {
        "task": "classification",
        "model": {
            "name": "vmamba_pico",
            "args": {"depths": [1, 1], "dims": [16, 32], "stem_stride": 4, "drop_path_rate": 0.3},
        },
        "data": {"root": str(images), "image_size": 32},
        "augment": {"mixup": 0.8, "cutmix": 1.0},
        "optim": {"lr": 2e-3},
        "schedule": {"epochs": EPOCHS, "warmup_epochs": 1},
        "train": {"batch_size": 8, "ema_decay": 0.9, "checkpoint_every": 3, "workers": 0, "threads": 1},
    }


def run_and_die(step: int, delay: float, arguments: list[str]) -> None:
    """Train, and be killed `delay` seconds after a step begins, counted from 1."""
    from vmamba.train.module import TaskModule
    from vmamba_cli.__main__ import main

    training_step, calls = TaskModule.training_step, [0]

    def counted(self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == step and os.environ.get("LOCAL_RANK", "0") == "0":
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return training_step(self, *args)

    TaskModule.training_step = counted  # type: ignore[method-assign]
    sys.argv = ["vmamba", *arguments]
    main()


def outcome(folder: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The final state of a run."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    states = {f"weights {name}": value for name, value in checkpoint["state_dict"].items()}
    for number, state in checkpoint["optimizer_states"][0]["state"].items():
        states |= {f"optimiser {number} {name}": value for name, value in state.items()}
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [
            {key: value for key, value in row.items() if key != "images/s"} for row in csv.DictReader(file)
        ]
    return states, rows


def same(one: Any, other: Any) -> bool:
    return (
        one[0].keys() == other[0].keys()
        and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
        and one[1] == other[1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_folder(folder / "images")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder / "images")))
        several = (
            [f"train.devices={options.processes}", "train.accelerator=cpu"] if options.processes > 1 else []
        )

        def train(out: Path, workers: int, *victim: str) -> int:
            command = (
                [sys.executable, __file__, "victim", *victim]
                if victim
                else [sys.executable, "-m", "vmamba_cli"]
            )
            arguments = ["train", str(folder / "recipe.yaml"), "--out", str(out), "--auto-resume"]
            done = subprocess.run(
                [*command, *arguments, f"train.workers={workers}", *several], capture_output=True, text=True
            )
            if done.returncode not in (0, -signal.SIGKILL):
                raise SystemExit(f"exit status {done.returncode}:\n{done.stderr}")
            return done.returncode

        train(folder / "whole", 1)
        whole = outcome(folder / "whole")
        rows = []
        for number in range(options.kills):
            out = folder / f"killed_{number}"
            step, delay, workers = draw.randint(1, EPOCHS * STEPS), draw.uniform(0, 0.15), number % 3
            start = time.perf_counter()
            killed = train(out, workers, str(step), str(delay)) == -signal.SIGKILL
            last = out / "checkpoints" / "last.ckpt"  # not there yet if the first was being written
            at = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
            train(out, (workers + 1) % 3)
            row = {
                "kill": number + 1,
                "in step": step,
                "after ms": round(1e3 * delay),
                "workers": workers,
                "killed": killed,
                "went on from step": at,
                "same": same(outcome(out), whole),
            }
            rows.append(row)
            print(
                ", ".join(f"{key} {value}" for key, value in row.items()),
                f"({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    good = sum(row["killed"] and row["same"] for row in rows)
    killed = sum(row["killed"] for row in rows)
    print(f"{good} of {killed} killed runs ended with the same weights, to the last bit")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        results = {
            "command": f"benchmarks/faults/kill.py --kills {options.kills} --processes {options.processes}",
            "date": date.today().isoformat(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "kills": rows,
        }
        name = "kill.json" if options.processes == 1 else f"kill_{options.processes}_processes.json"
        (options.out / name).write_text(json.dumps(results, indent=1) + "\n")
    if not all(row["same"] and row["killed"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["victim"]:
        run_and_die(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
    else:
        main()
