"""OpenVINO's IR: from the ONNX graph, in 32 or 8 bits."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vmamba.data.finding import LeftOut, find_images
from vmamba.errors import DataError, ExportError, OutputError
from vmamba.export.check import check_shapes, openvino_core, openvino_runner
from vmamba.export.packages import require
from vmamba.export.subject import Subject
from vmamba.files import replacing

CALIBRATION_IMAGES = 300
"""At most so many images decide the ranges of an 8-bit model."""


@dataclass(frozen=True)
class Quantised:
    """What 8 bits change.

    Attributes:
        images: Of the calibration.
        agreement: The share of them for which both give the same class.
        labelled: Images with a known class; 0 without a labelled folder.
        accuracy: The share of them that the 32-bit model gets right.
        accuracy_int8: The share of them that the 8-bit model gets right.
    """

    images: int
    agreement: float
    labelled: int = 0
    accuracy: float = 0.0
    accuracy_int8: float = 0.0


def to_openvino(graph: ir.Model) -> Any:
    """An `openvino.Model` of an ONNX graph, with its metadata."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        ir.save(graph, file)
        model = openvino_core().read_model(file)
        # Read by now: what is read from a file may be read again when it is needed.
        model = model.clone()
    for key, value in graph.metadata_props.items():
        model.set_rt_info(value, key.split("."))
    return model


def save_ir(model: Any, path: Path) -> int:
    """Write the .xml and the .bin, each in one go, and return their size in bytes.

    Raises:
        OutputError: One can't be written.
    """
    import openvino

    weights = path.with_suffix(".bin")
    with replacing(weights) as new_weights, replacing(path) as new_path:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            try:
                openvino.save_model(model, Path(folder) / "model.xml", compress_to_fp16=False)
            except RuntimeError as error:  # a full disk, say
                raise OutputError(f"{path}: cannot be written: {error}") from error
            os.replace(Path(folder) / "model.bin", new_weights)
            os.replace(Path(folder) / "model.xml", new_path)
        return int(new_weights.stat().st_size + new_path.stat().st_size)


def check_int8(
    subject: Subject, calibration: str | os.PathLike[str], labelled: str | os.PathLike[str] | None
) -> None:
    """Refuse what can't be quantised: asked before the minute that an export takes.

    Args:
        subject: The model.
        calibration: A folder of images.
        labelled: A folder with a folder of images for each class.

    Raises:
        ExportError: The model is no classifier, or NNCF is not installed.
        DataError: A folder has no images, or its folders are not named like the classes.
    """
    outputs = list(subject.outputs(subject.example(subject.preprocessing.size, batch=1)).values())
    if len(outputs) != 1 or outputs[0].ndim != 2:
        raise ExportError(f"{subject.name}: 8 bits are for classifiers, whose answers can be compared")
    _images(calibration)
    if labelled is not None:
        _labelled(subject, labelled)
    require("nncf")


def quantised(
    model: Any,
    subject: Subject,
    any_size: bool,
    calibration: str | os.PathLike[str],
    labelled: str | os.PathLike[str] | None,
) -> tuple[Any, Quantised]:
    """A model in 8 bits by NNCF, and what that changes.

    Args:
        model: An `openvino.Model`.
        subject: What it was made from: a classifier.
        any_size: Whether it takes any size of image.
        calibration: See `check_int8`, which is called before.
        labelled: Likewise.

    Raises:
        ExportError: 8 bits fail for a size of image.
    """
    import nncf
    from nncf.quantization.advanced_parameters import QuantizationParameters

    images = [_input(subject, path) for path in _images(calibration)[:CALIBRATION_IMAGES]]
    # One range for all channels of an activation: NNCF moves the ranges that it keeps for each channel of a
    # depthwise convolution's input past a transposition, and then takes the image's rows for channels.
    whole = QuantizationParameters(per_channel=False)
    narrow = nncf.quantize(
        model,
        nncf.Dataset(images),
        subset_size=len(images),
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(activations_quantization_params=whole),
    )
    check_shapes(*openvino_runner(narrow), subject, any_size)
    wide_class, narrow_class = _classifier(model), _classifier(narrow)
    same = [wide_class(image) == narrow_class(image) for image in images]
    if labelled is None:
        return narrow, Quantised(len(images), float(np.mean(same)))
    answers = [
        (wide_class(image) == number, narrow_class(image) == number)
        for image, number in (
            (_input(subject, path), number) for path, number in _labelled(subject, labelled)
        )
    ]
    accuracy, accuracy_int8 = np.mean(answers, axis=0).tolist()
    return narrow, Quantised(len(images), float(np.mean(same)), len(answers), accuracy, accuracy_int8)


def _images(folder: str | os.PathLike[str]) -> list[Path]:
    root = Path(folder).expanduser()
    names = find_images(str(root), LeftOut()) if root.is_dir() else []
    if not names:
        raise DataError(f"{root}: no folder with images")
    return [root / name for name in names]


def _input(subject: Subject, path: Path) -> NDArray[Any]:
    """A file's image as the model's input."""
    preprocessing = subject.preprocessing
    image: Any = preprocessing.read(path)
    if subject.preprocesses:
        return np.asarray(image)[None]
    return preprocessing.transform()(image)[None].numpy()


def _classifier(model: Any) -> Callable[[NDArray[Any]], int]:
    run, _ = openvino_runner(model)

    def most_probable(image: NDArray[Any]) -> int:
        (scores,) = run(image).values()
        return int(scores[0].argmax())

    return most_probable


def _labelled(subject: Subject, folder: str | os.PathLike[str]) -> list[tuple[Path, int]]:
    """The images of a labelled folder, and the numbers of their classes."""
    root = Path(folder).expanduser()
    named = [(path, path.relative_to(root).parts[0]) for path in _images(root) if path.parent != root]
    names = sorted({name for _, name in named})
    classes = list(subject.classes)
    if not names or not set(names) <= set(classes):
        unknown = [name for name in names if name not in classes]
        raise DataError(
            f"{root}: expected a folder of images for each class, named like it; "
            + (f"no class is named {', '.join(unknown[:5])}" if unknown else "it has none")
        )
    return [(path, classes.index(name)) for path, name in named]
