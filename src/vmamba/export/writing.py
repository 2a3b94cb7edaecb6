"""`vmamba.export.onnx` and `openvino`: write a model, and check the file before it takes its place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import nn

from vmamba.errors import OutputError
from vmamba.export.check import PIXELS, Check, compare, onnxruntime_runner, openvino_runner
from vmamba.export.graph import halve_weights, write_graph
from vmamba.export.ir import Quantised, check_int8, quantised, save_ir, to_openvino
from vmamba.export.packages import is_installed, require
from vmamba.export.scan import Spelling
from vmamba.export.subject import Subject, WeightType
from vmamba.files import replacing
from vmamba.inference import Predictor


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        nodes: Of the graph; bodies of Scans count as one node.
        megabytes: Size of all files written, in 10⁶ bytes.
        dynamic: Which of "batch", "height" and "width" may change from call to call.
        outputs: The names of the outputs.
        check: The comparison with the model; None if there was none, for the runtime is not installed.
        quantised: What 8 bits changed; None in other files.
    """

    path: Path
    nodes: int
    megabytes: float
    dynamic: tuple[str, ...]
    outputs: tuple[str, ...]
    check: Check | None
    quantised: Quantised | None = None


def onnx(
    model: nn.Module | Predictor,
    path: str | os.PathLike[str],
    *,
    preprocess: bool = False,
    weights: WeightType = "float32",
    check: bool = True,
) -> Exported:
    """Write a model as one ONNX file for images of any size, and run it in ONNX Runtime beside the model.

    The file's input is "images": float32 (b, c, h, w), normed as the model expects; with `preprocess` uint8
    (b, h, w, 3), RGB. Outputs are "logits", "probabilities" with `preprocess`, or "map_0" … of a backbone.
    Class names, preprocessing and settings are in its metadata, under keys that begin with "vmamba.".

    Args:
        model: Ours, one of `vmamba.heads`, another of timm's, or a predictor of `vmamba.load`. Of Mask R-CNN
            the backbone with its pyramid is written. A model made for one size of image keeps it.
        path: The file. What it held is replaced once the new one has passed.
        preprocess: Put resizing, cropping and norming into the graph, and softmax behind the classifier.
        weights: "float16" stores weights in half the space; the computation is in float32 all the same.
        check: Run the file, if ONNX Runtime is installed.

    Raises:
        ExportError: The model can't be exported, or the file computes something else.
        ModelError: The preprocessing can't be put into a graph.
        OutputError: The file can't be written.
    """
    path = writable(path)
    subject = _subject(model, preprocess, weights)
    graph, dynamic = _graph(subject, weights, "onnxruntime")
    result = None
    with replacing(path) as temporary:
        if check and is_installed("onnxruntime"):
            with _pixels_shown(graph, subject):
                ir.save(graph, temporary)
            result = compare(*onnxruntime_runner(temporary), subject, "height" in dynamic)
        ir.save(graph, temporary)
        size = temporary.stat().st_size
    return Exported(path, len(graph.graph), size / 1e6, dynamic, _names(graph), result)


def openvino(
    model: nn.Module | Predictor,
    path: str | os.PathLike[str],
    *,
    preprocess: bool = False,
    weights: WeightType = "float32",
    check: bool = True,
    calibration: str | os.PathLike[str] | None = None,
    labelled: str | os.PathLike[str] | None = None,
) -> Exported:
    """Write a model as OpenVINO's IR, `path` and a .bin beside it, and run it beside the model.

    Input and outputs are those of `onnx`; metadata are in the IR's runtime information, under "vmamba".

    Args:
        model: See `onnx`.
        path: The .xml file.
        preprocess: See `onnx`.
        weights: See `onnx`.
        check: Run the model before it is written, and before it is quantised.
        calibration: A folder of images by which NNCF quantises it to 8 bits; a classifier alone.
        labelled: A folder with a folder of images for each class, to tell the change in accuracy.

    Raises:
        ExportError: The model can't be exported, or the file computes something else.
        ModelError: The preprocessing can't be put into a graph.
        OutputError: The path does not end in .xml, or the files can't be written.
        DataError: A folder has no images.
    """
    require("openvino")
    path = writable(path)
    if path.suffix != ".xml":
        raise OutputError(f"{path}: expected a name that ends in .xml; its weights go to a .bin beside it")
    subject = _subject(model, preprocess, weights)
    if calibration is not None:
        check_int8(subject, calibration, labelled)
    graph, dynamic = _graph(subject, weights, "openvino")
    result = None
    if check:
        with _pixels_shown(graph, subject):
            converted = to_openvino(graph)
        result = compare(*openvino_runner(converted), subject, "height" in dynamic)
    converted = to_openvino(graph)
    change = None
    if calibration is not None:
        converted, change = quantised(converted, subject, "height" in dynamic, calibration, labelled)
    size = save_ir(converted, path)
    return Exported(path, len(graph.graph), size / 1e6, dynamic, _names(graph), result, change)


def _subject(model: nn.Module | Predictor, preprocess: bool, weights: WeightType) -> Subject:
    subject = Subject.of(model).with_weights(weights)
    return subject.with_preprocessing() if preprocess else subject


def _graph(subject: Subject, weights: WeightType, spelling: Spelling) -> tuple[ir.Model, tuple[str, ...]]:
    graph, dynamic = write_graph(subject, spelling)
    if weights == "float16":
        halve_weights(graph)
    return graph, dynamic


def _names(graph: ir.Model) -> tuple[str, ...]:
    return tuple(str(output.name) for output in graph.graph.outputs)


def writable(path: str | os.PathLike[str]) -> Path:
    """The path, if a file can be written there: asked before the minute that an export takes.

    Raises:
        OutputError: It cannot.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise OutputError(f"{path}: a folder; expected the name of a file")
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: cannot be written, {folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: cannot be written, {folder} is not writable")
    return path


@contextmanager
def _pixels_shown(graph: ir.Model, subject: Subject) -> Iterator[None]:
    """A graph with preprocessing also gives the preprocessed images inside the block, for the check."""
    outputs = graph.graph.outputs
    shown = [
        value
        for node in graph.graph
        for value in node.outputs
        if subject.preprocesses and value.name == PIXELS
    ]
    outputs.extend(shown)
    try:
        yield
    finally:
        for value in shown:
            outputs.remove(value)
