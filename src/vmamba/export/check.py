"""Running what was written, and comparing it with the module that it was made from."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vmamba.errors import ExportError
from vmamba.export.pixels import PIXELS
from vmamba.export.subject import Subject

Runner = Callable[[NDArray[Any]], Mapping[str, NDArray[Any]]]
"""From the input to the outputs by name."""

TOLERANCE = 1e-5
"""Of the largest value of an output. Both sides compute in float32, which gives about 1e-6; with float16
weights too, which are the same numbers on both sides."""

PIXEL_SHARE = 1e-3
"""Of the values of preprocessed images so many may differ by one level of 255: where a sum lies on the
border between two whole numbers."""

_SIZES = ((1, (33, 40)), (2, (96, 160)), (3, (64, 64)))
_PHOTOS = ((1, (250, 333)), (2, (120, 97)))
_TIMED_CALLS = 3


@dataclass(frozen=True)
class Check:
    """What the comparison gave.

    Attributes:
        runtime: Its name and version.
        difference: The largest one over the largest value of the output, of all outputs and inputs.
        shapes: Of the inputs that were tried.
        size: Height and width for which the speed was measured, of one image.
        seconds: Of a call of the runtime.
        torch_seconds: Of a call of the module in PyTorch, with as many threads.
        threads: How many.
    """

    runtime: str
    difference: float
    shapes: tuple[tuple[int, ...], ...]
    size: tuple[int, int]
    seconds: float
    torch_seconds: float
    threads: int


def compare(run: Runner, runtime: str, subject: Subject, any_size: bool) -> Check:
    """Run a file on several sizes.

    Args:
        run: Runs the file.
        runtime: Its name and version.
        subject: What it was made from.
        any_size: Whether the file takes any size of image.

    Raises:
        ExportError: A value differs by more than `TOLERANCE`.
    """
    differences, shapes = [], []
    for images in _inputs(subject, any_size):
        shapes.append(tuple(images.shape))
        difference = _difference(_answer(run, runtime, subject, images), subject, images)
        if not difference <= TOLERANCE:  # NaN too
            raise ExportError(
                f"{subject.name}: the file gives other numbers than the model, in {runtime}, for input "
                f"{tuple(images.shape)}: they differ by {difference:.1e} of the largest value, and "
                f"{TOLERANCE:g} is allowed; nothing was written. Please report it with the model"
            )
        differences.append(difference)
    size = subject.preprocessing.size
    images = subject.example(size, batch=1)
    seconds, torch_seconds = _times([lambda: run(images.numpy()), lambda: subject.outputs(images)])
    return Check(
        runtime, max(differences), tuple(shapes), size, seconds, torch_seconds, torch.get_num_threads()
    )


def check_shapes(run: Runner, runtime: str, subject: Subject, any_size: bool) -> None:
    """Run a model of other numbers, as 8 bits give: there must be an output for each image of each size.

    Args:
        run: Runs the model.
        runtime: Its name and version.
        subject: What it was made from.
        any_size: Whether the model takes any size of image.

    Raises:
        ExportError: The model fails, or gives outputs of another shape.
    """
    for images in _inputs(subject, any_size):
        shapes = {name: value.shape for name, value in _answer(run, runtime, subject, images).items()}
        expected = {name: tuple(value.shape) for name, value in subject.outputs(images).items()}
        if shapes != expected:
            raise ExportError(
                f"{subject.name}: in {runtime} the 8-bit model gives outputs of the shapes {shapes} for "
                f"{tuple(images.shape)}, expected {expected}; nothing was written"
            )


def _answer(run: Runner, runtime: str, subject: Subject, images: Tensor) -> Mapping[str, NDArray[Any]]:
    try:
        return run(images.numpy())
    except Exception as error:  # of the runtime's kinds, which it does not document
        raise ExportError(
            f"{subject.name}: {runtime} fails on {tuple(images.shape)}; nothing was written: {error}"
        ) from error


def _inputs(subject: Subject, any_size: bool) -> list[Tensor]:
    own = [(batch, subject.preprocessing.size) for batch in (1, 3)]
    sizes: Sequence[tuple[int, tuple[int, int]]] = _PHOTOS if subject.preprocesses else _SIZES
    if not any_size:
        sizes = own
    elif not subject.scans and not subject.preprocesses:
        sizes = [*sizes, *own]
    examples = [subject.example(size, batch, seed) for seed, (batch, size) in enumerate(sizes)]
    # A model of others may take multiples of its patches alone.
    return [each for each in examples if subject.scans or _takes(subject, each)]


def _takes(subject: Subject, images: Tensor) -> bool:
    """Whether the module takes images of this size; it does take its own."""
    try:
        subject.outputs(images)
    except Exception:  # of its own kinds
        return False
    return True


def _difference(outputs: Mapping[str, NDArray[Any]], subject: Subject, images: Tensor) -> float:
    if subject.preprocesses:
        pixels = torch.from_numpy(outputs[PIXELS].copy())
        _check_pixels(subject, images, pixels)
        module: Any = subject.module
        with torch.inference_mode():
            expected = {"probabilities": module.model(pixels).softmax(1)}
    else:
        expected = subject.outputs(images)
    return max(_relative(outputs[name], value.numpy()) for name, value in expected.items())


def _relative(value: NDArray[Any], expected: NDArray[Any]) -> float:
    if value.shape != expected.shape:
        return float("inf")
    return float(np.abs(value - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def _check_pixels(subject: Subject, images: Tensor, pixels: Tensor) -> None:
    """Compare preprocessed images with the library's own.

    Raises:
        ExportError: More than `PIXEL_SHARE` of the values differ, or one by more than a level.
    """
    module: Any = subject.module
    expected = torch.ops.vmamba_export.pixels(images, module.settings)
    level = torch.tensor(subject.preprocessing.std)[:, None, None] * 255
    levels = ((pixels - expected) * level).abs()
    share = float((levels > 0.5).float().mean())
    if pixels.shape != expected.shape or share > PIXEL_SHARE or float(levels.max()) > 1.01:
        raise ExportError(
            f"{subject.name}: the preprocessing in the file gives other pixels than the library's: "
            f"{share:.2%} of the values differ, by up to {float(levels.max()):.1f} levels of 255; nothing "
            "was written"
        )


def _times(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """The shortest time of each call, in turns."""
    best = [float("inf")] * len(calls)
    for attempt in range(1 + _TIMED_CALLS):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if attempt:  # the first is for the caches
                best[index] = min(best[index], time.perf_counter() - start)
    return best


def onnxruntime_runner(path: Path) -> tuple[Runner, str]:
    """A runner of an ONNX file, and the runtime's name and version.

    Raises:
        ExportError: It refuses the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    runtime = f"ONNX Runtime {onnxruntime.__version__}"
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of its own kinds, which it does not document
        raise ExportError(f"{runtime} refuses what was written: {error}") from error
    names = [output.name for output in session.get_outputs()]
    source = session.get_inputs()[0].name

    def run(images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return dict(zip(names, session.run(None, {source: images}), strict=True))

    return run, runtime


@cache
def openvino_core() -> Any:
    """The one `openvino.Core` of the process.

    A Core's plugin gives the thread another stack for signal handlers, and puts the previous one back when it
    is freed. Of two that are freed in the order of their creation the second puts back the freed stack of the
    first, and the next signal that Python handles, such as SIGINT or SIGCHLD, ends the process (2026.4.1).
    """
    import openvino

    return openvino.Core()


def openvino_runner(model: Any) -> tuple[Runner, str]:
    """A runner of an `openvino.Model`, in float32 also where the processor has narrower types."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(model, "CPU", settings)

    def run(images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return {output.any_name: value for output, value in compiled([images]).items()}

    return run, f"OpenVINO {openvino.__version__.partition('-')[0]}"
