"""Prediction with trained models: `load` gives a `Predictor`, without Lightning and without training data.

Sizes in comments: b images, k classes, c h w channels, height and width.
"""

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from vmamba.data.decoding import DecodedImage, printable
from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import DataError, MissingCheckpointError, ModelError
from vmamba.models.checkpoints import Place, Weights, expand, open_checkpoint
from vmamba.models.factory import check_name, create_model
from vmamba.pretrained import CLASSIFICATION, default_classes, is_dense, restore, task_of
from vmamba.words import counted, listed


@dataclass(frozen=True)
class Prediction(ABC):
    """A model's prediction for one image; `dataclasses.asdict` turns it into plain values.

    Attributes:
        image: The path that was given, or None for an image that has none.
    """

    image: str | None

    @abstractmethod
    def text(self) -> str:
        """One line for a terminal, without the image's name."""


@dataclass(frozen=True)
class FailedImage(Prediction):
    """Takes the place of a prediction where an image could not be read or the model's output is NaN.

    Attributes:
        error: What went wrong.
    """

    error: str

    def text(self) -> str:
        return self.error


@dataclass(frozen=True)
class ClassScore:
    """A class and the probability given to it."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification(Prediction):
    """The classes of an image, the likeliest first."""

    classes: list[ClassScore]

    def text(self) -> str:
        return ", ".join(f"{c.label} {c.score:.1%}" for c in self.classes)


Size = tuple[int, int]
"""Height and width, in pixels."""

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""A path; a Pillow image; an array (h, w) or (h, w, c) of uint8; a tensor (c, h, w), of uint8, or of floats
that are preprocessed already."""


class Predictor(ABC):
    """A model in evaluation mode, with what is needed to run it on images.

    Reading, batches, devices and errors are here; a subclass for a task turns the model's outputs into
    predictions.

    Args:
        model: From images (b, c, h, w) to the outputs that `decode` takes. It is moved and converted.
        preprocessing: From an image file to the model's input.
        classes: Names of the classes.
        transform: From a decoded image to the model's input (c, h, w); None for that of `preprocessing`.
        device: As PyTorch names it; None for where the model is.
        dtype: A floating type; None for the model's.
    """

    task: ClassVar[str]
    batch_size: ClassVar[int] = 16
    """Images in a batch of the model, if a call does not say."""
    top: ClassVar[int | None] = 5
    """How many answers to keep of an image, if a call does not say; None for all."""

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        classes: Sequence[str],
        *,
        transform: Callable[[DecodedImage], Tensor] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model.to(device=device, dtype=dtype).eval()
        self.preprocessing = preprocessing
        self.transform = preprocessing.transform() if transform is None else transform
        self.classes = list(classes)

    def run(self, inputs: Tensor, sizes: Sequence[Size]) -> Any:
        """Run the model on inputs of equal size, (b, c, h, w), and return what `decode` takes.

        Args:
            inputs: As the transform makes them, on the CPU.
            sizes: Of the images that they were made of.
        """
        return self.model(inputs.to(self.device, self.dtype))

    @abstractmethod
    def decode(self, outputs: Any, names: Sequence[str | None], top: int | None) -> list[Prediction]:
        """The model's outputs for a batch → a prediction for each image.

        Args:
            outputs: The model's outputs, from `run`.
            names: The images' names.
            top: How many of the likeliest answers to keep; None for all.
        """

    def __repr__(self) -> str:
        config = getattr(self.model, "pretrained_cfg", None) or {}
        height, width = self.preprocessing.size
        facts = [
            str(config.get("architecture") or type(self.model).__name__),
            f"classes={len(self.classes)} ({listed(self.classes, 3)})",
            f"input={self.preprocessing.channels}x{height}x{width}",
            f"device={str(self.device)!r}",
            f"dtype={self.dtype}",
        ]
        return f"{type(self).__name__}({', '.join(facts)})"

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's weights and input."""
        return next(self.model.parameters()).dtype

    def __call__(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int | None = None,
        top: int | Literal["auto"] | None = "auto",
    ) -> Any:
        """Predict one image, or several.

        Args:
            images: One image, or an iterable of them. An array or a tensor with one more dimension is a
                batch.
            batch_size: Images in a batch of the model; None for the task's, which is 16 for classification.
            top: How many of the likeliest answers to keep; None for all; "auto" for the task's, which is 5
                classes for classification.

        Returns:
            The prediction for one image; for several a list in their order, with a `FailedImage` for each
            that failed.

        Raises:
            TypeError: `images` is neither an image nor several.
            DataError: The only image is missing, damaged or of other channels, or its outputs are NaN.
        """
        if not _is_one_image(images):
            return list(self.stream(images, batch_size=batch_size, top=top))  # type: ignore[arg-type]
        (prediction,) = self.stream([images], batch_size=1, top=top)  # type: ignore[list-item]
        if isinstance(prediction, FailedImage):
            raise DataError(prediction.error)
        return prediction

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        batch_size: int | None = None,
        top: int | Literal["auto"] | None = "auto",
    ) -> Iterator[Prediction]:
        """As a call with several images, but lazily: images are read one batch at a time.

        Raises:
            TypeError: `images` cannot be iterated over.
            ValueError: `batch_size` or `top` is below 1.
            ModelError: The device has not enough memory, or the model does not take the images' size.
        """
        batch_size = self.batch_size if batch_size is None else batch_size
        most = self.top if top == "auto" else top
        for name, value in (("batch_size", batch_size), ("top", most)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        try:
            images = iter(images)
        except TypeError:
            raise TypeError(f"{_EXPECTED}, or several of these, got {type(images).__name__}") from None
        return self._stream(images, batch_size, most)

    def _stream(self, images: Iterable[ImageLike], batch_size: int, top: int | None) -> Iterator[Prediction]:
        batch: list[tuple[str | None, _Input | FailedImage]] = []
        for image in images:
            batch.append(self._prepare(image))
            if len(batch) == batch_size:
                yield from self._judge(batch, top)
                batch = []
        yield from self._judge(batch, top)

    def _prepare(self, image: ImageLike) -> tuple[str | None, "_Input | FailedImage"]:
        """The image's name, and the model's input or a `FailedImage`."""
        name = os.fsdecode(image) if isinstance(image, str | bytes | os.PathLike) else None
        try:
            if isinstance(image, Tensor) and image.is_floating_point():
                self._check_preprocessed(image)
                return name, _Input(image, _size(image))
            decoded = self._read(image, name)
            return name, _Input(self.transform(decoded), _size(decoded))
        except DataError as error:
            return name, FailedImage(name, str(error))

    def _check_preprocessed(self, image: Tensor) -> None:
        channels = self.preprocessing.channels
        if image.ndim != 3 or len(image) != channels:
            shape = tuple(image.shape)
            raise DataError(f"tensor: expected ({channels}, height, width), preprocessed, got {shape}")
        _refuse_empty("tensor", image)

    def _read(self, image: ImageLike, name: str | None) -> DecodedImage:
        preprocessing = self.preprocessing
        if name is not None:
            _refuse_several(name)
            return preprocessing.read(expand(name), printable(name))
        if isinstance(image, Image.Image):
            try:
                return preprocessing.convert(image)
            except OSError as error:  # Pillow decodes an opened file only here
                raise DataError(f"image: damaged ({error})") from error
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.ndim not in (2, 3):
                raise DataError(
                    "tensor: expected (channels, height, width), of uint8 or of floats that are preprocessed,"
                    f" got {tuple(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
                )
            pixels = image.movedim(0, -1) if image.ndim == 3 else image
            return self._decoded(pixels.cpu().numpy(), "tensor")
        if not isinstance(image, np.ndarray):
            raise DataError(f"{_EXPECTED}, got {type(image).__name__}")
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            floats = "; if its values are from 0 to 1: (array * 255).round().astype('uint8')"
            raise DataError(
                f"array: expected (height, width) or (height, width, channels) of uint8, got {image.shape} "
                f"of {image.dtype}{floats if np.issubdtype(image.dtype, np.floating) else ''}"
            )
        return self._decoded(image, "array")

    def _decoded(self, pixels: np.ndarray, what: str) -> DecodedImage:
        """An array (h, w) or (h, w, c) of uint8 as a decoded image."""
        channels = self.preprocessing.channels
        _refuse_empty(what, pixels)
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        if pixels.ndim == 2 or pixels.shape[2] in (3, 4):
            return self.preprocessing.convert(Image.fromarray(np.ascontiguousarray(pixels)), what)
        if pixels.shape[2] != channels:
            order, turn = _ORDERS[what]
            raise DataError(
                f"{what}: {pixels.shape[2]} channels, and the model takes {channels}; expected {order}, "
                f"which {turn} gives if they are in the other order"
            )
        return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 255)

    def _judge(
        self, batch: Sequence[tuple[str | None, "_Input | FailedImage"]], top: int | None
    ) -> Iterator[Prediction]:
        by_shape: dict[torch.Size, list[int]] = {}
        predictions: dict[int, Prediction] = {}
        for index, (_, item) in enumerate(batch):
            if isinstance(item, FailedImage):
                predictions[index] = item
            else:
                by_shape.setdefault(item.pixels.shape, []).append(index)
        for indices in by_shape.values():
            items: list[Any] = [batch[index][1] for index in indices]
            names = [batch[index][0] for index in indices]
            outputs = self._run(torch.stack([item.pixels for item in items]), [item.size for item in items])
            predictions.update(zip(indices, self.decode(outputs, names, top), strict=True))
        yield from (predictions[index] for index in range(len(batch)))

    def _run(self, inputs: Tensor, sizes: Sequence[Size]) -> Any:
        try:
            with torch.inference_mode():
                return self.run(inputs, sizes)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{self.device} has not enough memory for {counted(len(inputs), 'image')} at once; lower the "
                "batch size"
            ) from error
        except (AssertionError, ValueError, RuntimeError) as error:  # by which models refuse a size
            size = "×".join(map(str, inputs.shape[1:]))
            raise ModelError(f"the model does not take images of {size}: {error}") from error


@dataclass(frozen=True)
class _Input:
    """The model's input (c, h, w), and the size of the image that it was made of."""

    pixels: Tensor
    size: Size


class ClassificationPredictor(Predictor):
    """For models that give logits (b, k); see `Predictor`.

    Raises:
        ModelError: The number of class names differs from the model's `num_classes`, if it has that.
    """

    task = CLASSIFICATION

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        classes: Sequence[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        number = getattr(model, "num_classes", len(classes))
        if number != len(classes):
            expected = counted(number, "class", "classes")
            raise ModelError(f"classes: {counted(len(classes), 'name')} for a model of {expected}")
        super().__init__(model, preprocessing, classes, device=device, dtype=dtype)

    def decode(self, outputs: Tensor, names: Sequence[str | None], top: int | None) -> list[Prediction]:
        probabilities = outputs.to(torch.promote_types(outputs.dtype, torch.float32)).softmax(1).cpu()
        scores, order = probabilities.sort(dim=1, descending=True, stable=True)
        predictions: list[Prediction] = []
        for name, row, indices in zip(names, scores[:, :top].tolist(), order[:, :top].tolist(), strict=True):
            if any(score != score for score in row):
                predictions.append(not_finite(name))
                continue
            pairs = zip(indices, row, strict=True)
            predictions.append(
                Classification(name, [ClassScore(self.classes[index], score) for index, score in pairs])
            )
        return predictions


def not_finite(name: str | None) -> FailedImage:
    """What takes the place of a prediction where the model's outputs are NaN or infinite."""
    where = "" if name is None else f"{printable(name)}: "
    return FailedImage(name, f"{where}the model's outputs are NaN or infinite; try float32, or other weights")


_EXPECTED = "expected a path, an image, an array or a tensor"
_ORDERS = {
    "array": ("(height, width, channels)", "array.transpose(1, 2, 0)"),
    "tensor": ("(channels, height, width)", "tensor.permute(2, 0, 1)"),
}
"""The order of dimensions that an image has, and how to turn the other one into it."""


def _size(image: DecodedImage) -> Size:
    height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
    return height, width


def _refuse_empty(what: str, image: np.ndarray | Tensor) -> None:
    if 0 in image.shape:
        raise DataError(f"{what}: it has no pixels, its shape is {tuple(image.shape)}")


def _refuse_several(name: str) -> None:
    """Refuse a folder or a pattern where the path of one image is expected."""
    path = expand(name)
    folder = os.path.isdir(path)
    if folder or (any(char in name for char in "*?[") and not os.path.lexists(path)):
        what = "a folder" if folder else "no such image; a pattern"
        raise DataError(
            f"{printable(name)}: {what} is not opened here: give the paths in it, such as "
            "sorted(Path(FOLDER).rglob('*.jpg')), or run `vmamba predict`, which takes folders and patterns"
        )


def _is_one_image(images: Any) -> bool:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim <= 3
    return isinstance(images, str | bytes | os.PathLike | Image.Image)


def load(
    source: Place,
    *,
    model: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    classes: Sequence[str] | None = None,
    weights: Weights = "auto",
    trained: bool = True,
) -> Predictor:
    """A predictor from a run, a file of weights, or the name of a pretrained model.

    Args:
        source: A run's folder or checkpoint; `best.safetensors` or another folder in timm's hub form; a file
            of weights such as the VMamba authors' `.pth` of classifiers, of mmdet's Mask R-CNN or mmseg's
            UPerNet; or a model's name, such as "vmamba_tiny", whose pretrained weights are downloaded unless
            they come with the package, as those of "vmamba_pico_wide" do.
        model: The name of the model, or of a detector's or segmenter's backbone, for a file that does not
            contain it, or to be compared with the file's; None is enough if only one variant has the file's
            shapes.
        device: None or "auto" for the GPU if there is one; otherwise as PyTorch names it.
        dtype: "float32" (the default), "float16", "bfloat16" or "float64", or PyTorch's type.
        classes: Names of the classes; by default those of the file, or ImageNet's, COCO's or ADE20K's for
            models of as many.
        weights: "raw", as trained, "ema", their average, or "auto": a run's average if it has one.
        trained: False gives the same architecture with weights drawn anew, by PyTorch's generator, to compare
            with; nothing is downloaded.

    Raises:
        MissingCheckpointError: There is no such file, and no model of that name.
        CheckpointError: The file cannot be read safely, is damaged or does not fit the model.
        ModelError: The model's name, the device or the type is unknown, or must be given; or the file is of
            another model.
    """
    target, dtype = _device(device), _dtype(dtype)
    name = os.fsdecode(source)
    if model is None and not expand(source).exists() and timm.is_model(name.partition(".")[0]):
        network = create_model(name, pretrained=trained)
        preprocessing = Preprocessing.of_model(network)
        known = network.pretrained_cfg.get("label_names") or default_classes(network)
        names = list(known if classes is None else classes)
        return ClassificationPredictor(network, preprocessing, names, device=target, dtype=dtype)
    try:
        checkpoint = open_checkpoint(source)
    except MissingCheckpointError as error:
        if os.sep in name or expand(source).exists():
            raise
        try:
            check_name(name)
        except ModelError as unknown:
            raise MissingCheckpointError(f"{error}; {unknown}") from None
        raise
    predictor: Predictor
    if task_of(checkpoint) != CLASSIFICATION:
        tasks = importlib.import_module(_TASKS)
        predictor = tasks.load_predictor(
            checkpoint, weights, model=model, trained=trained, device=target, dtype=dtype
        )
        if classes is not None:
            if len(classes) != len(predictor.classes):
                expected = counted(len(predictor.classes), "class", "classes")
                raise ModelError(f"classes: {counted(len(classes), 'name')} for a model of {expected}")
            predictor.classes = list(classes)
        return predictor
    if checkpoint.config is None and is_dense(checkpoint.state_dict(weights)):
        dense = importlib.import_module(_DENSE)
        predictor = dense.load_dense(
            checkpoint, model, weights, classes, trained=trained, device=target, dtype=dtype
        )
        return predictor
    network, preprocessing, names = restore(checkpoint, model, weights, trained=trained)
    if classes is not None:
        names = list(classes)
    return ClassificationPredictor(network, preprocessing, names, device=target, dtype=dtype)


_TASKS = "vmamba.train.tasks"
"""The module with `load_predictor(checkpoint, weights, *, model, trained, device, dtype)` for all tasks but
classification. Imported only for those: a classifier does not need `vmamba.train`."""

_DENSE = "vmamba.dense_inference"
"""The module with the predictors of Mask R-CNN and UPerNet. Imported only for those: it takes a second."""


def _device(device: str | torch.device | None) -> torch.device:
    if device is None or device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device: {str(device)!r} is unknown or not here ({reason})") from error
    return target


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    types = {str(each).removeprefix("torch."): each for each in _DTYPES}
    if dtype is None:
        return torch.float32
    torch_dtype = types.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype not in _DTYPES:
        raise ModelError(f"dtype: expected one of {', '.join(types)}, got {dtype!r}")
    return torch_dtype


_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
