"""What exported models cost beside PyTorch: vmamba_tiny and its peers in ONNX Runtime and OpenVINO, in turns.

usage: python benchmarks/export.py [--rounds 10] [--threads 1] [--models vmamba_tiny …] [--out FILE.json]

Each model is written by `vmamba.export.onnx` and `vmamba.export.openvino`, which compare it with PyTorch.
Weights are drawn at random. Prints seconds of the export, nodes, seconds until a session is ready, the
largest difference, and milliseconds of one image of 224² in PyTorch, ONNX Runtime, and OpenVINO with any size
of image and with this one fixed before the file is compiled: medians over the rounds, and ratios to PyTorch
within a round.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch

import vmamba.export
from vmamba.environment import environment
from vmamba.export.check import onnxruntime_runner, openvino_core, openvino_runner

MODELS = ("vmamba_tiny", "swin_tiny_patch4_window7_224", "convnext_tiny")


def measure(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    """The row of a model."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    start = time.perf_counter()
    onnx = vmamba.export.onnx(model, folder / f"{name}.onnx")
    seconds = time.perf_counter() - start
    ir = vmamba.export.openvino(model, folder / f"{name}.xml")
    start = time.perf_counter()
    run_onnx, _ = onnxruntime_runner(onnx.path)
    loading = time.perf_counter() - start
    run_ir, _ = openvino_runner(openvino_core().read_model(ir.path))
    images = torch.randn(1, 3, 224, 224)
    fixed = openvino_core().read_model(ir.path)
    fixed.reshape(list(images.shape))
    run_fixed, _ = openvino_runner(fixed)
    calls = {
        "torch": lambda: model(images),
        "onnxruntime": lambda: run_onnx(images.numpy()),
        "openvino": lambda: run_ir(images.numpy()),
        "openvino, size fixed": lambda: run_fixed(images.numpy()),
    }
    times: dict[str, list[float]] = {key: [] for key in calls}
    with torch.inference_mode():
        for round_ in range(1 + rounds):
            for key, call in calls.items():
                start = time.perf_counter()
                call()
                if round_:  # the first is for the caches
                    times[key].append(time.perf_counter() - start)
    return {
        "model": name,
        "export_s": seconds,
        "nodes": onnx.nodes,
        "session_s": loading,
        "difference": {"onnxruntime": onnx.check.difference, "openvino": ir.check.difference},
        "ms": {key: 1e3 * statistics.median(values) for key, values in times.items()},
        "ratio": {
            key: statistics.median(a / b for a, b in zip(values, times["torch"], strict=True))
            for key, values in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            rows.append(measure(name, arguments.rounds, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.out is not None:
        values = {"environment": environment(), "threads": arguments.threads, "results": rows}
        arguments.out.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
