"""One ONNX file of each model, made from images of 64², in both runtimes beside PyTorch at other sizes, and
OpenVINO's own file.

usage: python benchmarks/export_parity.py [--models pico …] [--out FILE.json]

Batches of 1 to 3 images of (33, 40), (96, 160), (224, 224) and (384, 288). Prints for each model and runtime
the largest difference over the largest value of an output, and whether the five highest classes are the same
in the same order. Ends with status 1 if a difference exceeds 1e-5 or a class differs. Weights are drawn at
random.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import vmamba.export
from vmamba.environment import environment
from vmamba.export.check import TOLERANCE, Runner, onnxruntime_runner, openvino_core, openvino_runner
from vmamba.heads import Features, upernet

SIZES = ((33, 40), (96, 160), (224, 224), (384, 288))
MODELS: dict[str, Callable[[], nn.Module]] = {
    "vmamba_pico": lambda: timm.create_model("vmamba_pico"),
    "vmamba_tiny": lambda: timm.create_model("vmamba_tiny"),
    "vmamba_tiny_s1l8": lambda: timm.create_model("vmamba_tiny_s1l8"),
    "vanilla_vmamba_tiny": lambda: timm.create_model("vanilla_vmamba_tiny"),
    "cascade": lambda: timm.create_model("vmamba_pico", routes="cascade"),
    "features_only": lambda: timm.create_model("vmamba_pico", features_only=True),
    "upernet": lambda: upernet(
        Features(timm.create_model("vmamba_pico", stem_stride=4)), 21, channels=64, aux_channels=64
    ),
}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """The row of a model."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    start = time.perf_counter()
    exported = vmamba.export.onnx(model, folder / f"{name}.onnx", check=False)
    seconds = time.perf_counter() - start
    own = vmamba.export.openvino(model, folder / f"{name}.xml", check=False)
    runners = {
        "onnxruntime": onnxruntime_runner(exported.path)[0],
        "openvino": openvino_runner(openvino_core().read_model(exported.path))[0],
        "openvino, own file": openvino_runner(openvino_core().read_model(own.path))[0],
    }
    row: dict[str, Any] = {"model": name, "export_s": seconds, "nodes": exported.nodes}
    for runtime, run in runners.items():
        results = [
            compare(model, run, torch.randn(batch, 3, *size))
            for batch, size in itertools.product((1, 2, 3), SIZES)
        ]
        row[runtime] = {
            "difference": max(difference for difference, _ in results),
            "same_top5": all(same for _, same in results),
        }
    return row


def compare(model: nn.Module, run: Runner, images: torch.Tensor) -> tuple[float, bool]:
    """The largest difference over the largest value, and whether the five highest classes agree."""
    with torch.inference_mode():
        output: Any = model(images)
    expected = [output] if isinstance(output, torch.Tensor) else list(output)
    difference, same = 0.0, True
    for value, wanted in zip(run(images.numpy()).values(), expected, strict=True):
        wanted = wanted.numpy()
        difference = max(difference, float(np.abs(value - wanted).max() / np.abs(wanted).max()))
        if wanted.ndim == 2:
            best, wanted_best = (np.argsort(-scores, axis=1)[:, :5] for scores in (value, wanted))
            same = same and np.array_equal(best, wanted_best)
    return difference, same


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out is not None:
        values = {"environment": environment(), "results": rows}
        arguments.out.write_text(json.dumps(values, indent=2) + "\n")
    passed = all(
        outcome["difference"] <= TOLERANCE and outcome["same_top5"]
        for row in rows
        for outcome in row.values()
        if isinstance(outcome, dict)
    )
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
