"""Products of matrices of VMamba-T's layers in OpenVINO: 8 bits, quantised by NNCF, beside float32, in turns.

usage: python benchmarks/int8_products.py [--rounds 50]; one thread

The most that 8 bits can gain on a processor: where a bare product is no faster, no model is.
"""

import argparse
import statistics
import time
from typing import Any

import nncf
import numpy as np
import openvino
from openvino import opset13

from vmamba.export.check import openvino_core

SIZES = ((3136, 96, 384), (3136, 192, 96), (784, 192, 768), (196, 384, 1536), (1024, 512, 512))
"""Rows, inputs, outputs."""


def ratio(rows: int, inputs: int, outputs: int, rounds: int) -> tuple[float, float]:
    """Milliseconds in float32, and that over the time in 8 bits: medians over the rounds."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float32)

    x = opset13.parameter([1, rows, inputs], np.float32)
    product = opset13.matmul(x, opset13.constant(normal(inputs, outputs)), False, False)
    wide = openvino.Model([product], [x])
    images = nncf.Dataset([normal(1, rows, inputs) for _ in range(4)])
    narrow = nncf.quantize(wide, images, subset_size=4, model_type=nncf.ModelType.TRANSFORMER)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    models = [openvino_core().compile_model(model, "CPU", settings) for model in (wide, narrow)]
    value, times = normal(1, rows, inputs), []
    for _ in range(10 + rounds):
        start = time.perf_counter()
        models[0]([value])
        middle = time.perf_counter()
        models[1]([value])
        times.append((middle - start, time.perf_counter() - middle))
    times = times[10:]  # the first are for the caches
    return 1e3 * statistics.median(a for a, _ in times), statistics.median(a / b for a, b in times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    for size in SIZES:
        milliseconds, gain = ratio(*size, rounds)
        print(
            f"{'×'.join(map(str, size))}: float32 {milliseconds:.2f} ms, 8 bits {gain:.2f} × as fast",
            flush=True,
        )


if __name__ == "__main__":
    main()
