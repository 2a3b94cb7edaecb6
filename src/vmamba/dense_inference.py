"""Predictors of objects and of classes of pixels; `vmamba.load` gives them.

Sizes in comments: b images, n objects, k classes, c h w channels, height and width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.models.detection.transform import resize_boxes

from vmamba.data.decoding import DecodedImage, as_floats
from vmamba.data.names import ADE20K_CLASSES, COCO_CATEGORY_IDS, COCO_CLASSES
from vmamba.data.objects import encoded_masks, run_lengths
from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import ModelError
from vmamba.heads.mask_rcnn import MaskRCNN, recorded_logits
from vmamba.heads.masks import paste_masks
from vmamba.heads.restoring import restore
from vmamba.heads.sliding import SegmentedViews
from vmamba.heads.upernet import UPerNet
from vmamba.inference import Prediction, Predictor, Size, not_finite
from vmamba.models.checkpoints import Checkpoint, Weights
from vmamba.words import counted

_MIN_SCORE = 0.3
"""Objects of a lower probability are left out by default."""

_SCORES_SHOWN = 3
"""Most scores of a class in one line of text."""

_CLASSES_SHOWN = 5
"""Most classes of a segmented image in one line of text."""


@dataclass(frozen=True)
class DetectedObject:
    """An object in an image.

    Attributes:
        label: Name of its class.
        category: Number of its class in annotations, such as COCO's category id.
        score: Its probability.
        box: x1, y1, x2, y2 in pixels of the image.
        mask: As COCO's run-length code: {"size": [height, width], "counts": text}; `pycocotools.mask.decode`
            gives the pixels.
    """

    label: str
    category: int
    score: float
    box: tuple[float, float, float, float]
    mask: Mapping[str, Any]


@dataclass(frozen=True)
class Detection(Prediction):
    """The objects in an image, the surest first.

    Attributes:
        size: The image's height and width; its EXIF orientation is applied.
        objects: The objects.
    """

    size: Size
    objects: list[DetectedObject]

    def text(self) -> str:
        by_label: dict[str, list[float]] = {}
        for each in self.objects:
            by_label.setdefault(each.label, []).append(each.score)
        return ", ".join(_group_text(label, scores) for label, scores in by_label.items()) or "nothing"


def _group_text(label: str, scores: Sequence[float]) -> str:
    number = f"{len(scores)} " if len(scores) > 1 else ""
    shown = ", ".join(f"{score:.0%}" for score in scores[:_SCORES_SHOWN])
    return f"{number}{label} ({shown}{', …' if len(scores) > _SCORES_SHOWN else ''})"


@dataclass(frozen=True)
class ClassShare:
    """A class, its number, and its share of an image's pixels."""

    label: str
    number: int
    share: float


@dataclass(frozen=True)
class ClassShares(Prediction):
    """How much of an image each class covers, the largest first; classes without a pixel are left out.

    Attributes:
        size: The image's height and width; its EXIF orientation is applied.
        classes: The shares.
    """

    size: Size
    classes: list[ClassShare]

    def text(self) -> str:
        shown = [f"{each.label} {each.share:.1%}" for each in self.classes[:_CLASSES_SHOWN]]
        hidden = len(self.classes) - len(shown)
        return ", ".join([*shown, *([f"{hidden} more"] if hidden else [])])


class Segmentation(ClassShares):
    """The class of each pixel of an image, and their shares.

    `dataclasses.asdict` gives the shares alone: the map of classes is an image, not a value for JSON.

    Args:
        image: The path that was given, or None.
        labels: The map.
        classes: The shares.

    Attributes:
        labels: The number of each pixel's class, (h, w) at the image's size.
    """

    def __init__(self, image: str | None, labels: NDArray[np.uint8], classes: list[ClassShare]) -> None:
        height, width = labels.shape
        super().__init__(image, (height, width), classes)
        self.labels = labels


class DetectionPredictor(Predictor):
    """For a `MaskRCNN`, which resizes and norms images itself; see `Predictor`.

    A tensor of floats is an image (3, h, w) with values in 0 … 1. Images of equal size go through the model
    together. Masks are pasted one after the other, so that large images need little memory.

    Args:
        model: It is moved and converted.
        preprocessing: How images are decoded.
        classes: Names of the classes, without the background.
        category_ids: Their numbers in annotations; by default COCO's for COCO's classes, else from 1 on.
        min_score: Objects of a lower probability are left out; may be set later as well. None for 0.3, or for
            the score from which on the model gives objects, if that is higher.
        device: As PyTorch names it; None for where the model is.
        dtype: A floating type; None for the model's.

    Raises:
        ModelError: The number of names or ids is not that of the model's classes.
        DataError: pycocotools is not installed.
        ValueError: `min_score` is above 1, or below the score from which on the model gives objects.
    """

    task = "detection"
    batch_size = 1
    top = None

    def __init__(
        self,
        model: MaskRCNN,
        preprocessing: Preprocessing,
        classes: Sequence[str],
        *,
        category_ids: Sequence[int] | None = None,
        min_score: float | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_names(classes, model.config.num_classes - 1)
        if category_ids is None:
            category_ids = _category_ids(classes)
        if len(category_ids) != len(classes):
            number = counted(len(classes), "class", "classes")
            raise ModelError(f"category_ids: {counted(len(category_ids), 'id')} for {number}")
        run_lengths()  # raises if pycocotools is missing, before any image is read
        super().__init__(model, preprocessing, classes, transform=as_floats, device=device, dtype=dtype)
        self.category_ids = list(category_ids)
        self._least_score = model.config.score_threshold
        self.min_score = max(_MIN_SCORE, self._least_score) if min_score is None else min_score

    @property
    def min_score(self) -> float:
        """Objects of a lower probability are left out."""
        return self._min_score

    @min_score.setter
    def min_score(self, value: float) -> None:
        if not self._least_score <= value <= 1:
            raise ValueError(
                f"min_score: expected {self._least_score:g} (the model gives no objects of a lower "
                f"probability) to 1, got {value:g}"
            )
        self._min_score = value

    def run(self, inputs: Tensor, sizes: Sequence[Size]) -> list[dict[str, Tensor] | None]:
        """Detections of each image with masks (n, 1, m, m) of the boxes alone; None where there are NaNs."""
        model: Any = self.model
        with recorded_logits(model) as logits:
            images, _ = model.transform(list(inputs.to(self.device, torch.float32)))
            images.tensors = images.tensors.to(self.dtype)
            levels = model.backbone(images.tensors)
            proposals, _ = model.rpn(images, levels)
            detections, _ = model.roi_heads(levels, proposals, images.image_sizes)
        finite = logits[0].isfinite().all(1).split([len(each) for each in proposals])
        results: list[dict[str, Tensor] | None] = []
        for each, resized, size, sound in zip(detections, images.image_sizes, sizes, finite, strict=True):
            each["boxes"] = resize_boxes(each["boxes"].float(), resized, size)
            results.append({**each, "size": torch.tensor(size)} if len(sound) and sound.all() else None)
        return results

    def decode(
        self, outputs: Sequence[dict[str, Tensor] | None], names: Sequence[str | None], top: int | None
    ) -> list[Prediction]:
        return [
            not_finite(name) if output is None else self._detection(name, output, top)
            for name, output in zip(names, outputs, strict=True)
        ]

    def _detection(self, name: str | None, output: dict[str, Tensor], top: int | None) -> Detection:
        height, width = output["size"].tolist()
        number = int((output["scores"] >= self.min_score).sum())
        number = number if top is None else min(number, top)
        boxes = output["boxes"][:number]
        codes = mask_codes(output["masks"][:number], boxes, (height, width))
        objects = []
        for index, code in enumerate(codes):
            label = int(output["labels"][index]) - 1
            x1, y1, x2, y2 = boxes[index].tolist()
            objects.append(
                DetectedObject(
                    self.classes[label],
                    self.category_ids[label],
                    float(output["scores"][index]),
                    (x1, y1, x2, y2),
                    {**code, "counts": code["counts"].decode("ascii")},
                )
            )
        return Detection(name, (height, width), objects)


def mask_codes(masks: Tensor, boxes: Tensor, size: Size) -> list[dict[str, Any]]:
    """COCO's run-length codes of an image's masks, of which only one at a time is at the image's size.

    Args:
        masks: Probabilities within the boxes, (n, 1, m, m); a pixel belongs to the object from 0.5 on.
        boxes: (n, 4) in the image's pixels.
        size: Of the image.

    Returns:
        {"size": [height, width], "counts": bytes} of each.
    """
    codes = []
    for index in range(len(masks)):
        one = slice(index, index + 1)
        pasted = paste_masks(masks[one], boxes[one], size)[0] >= 0.5
        codes += encoded_masks(pasted.byte().cpu().numpy())
    return codes


def _check_names(classes: Sequence[str], number: int) -> None:
    if number != len(classes):
        expected = counted(number, "class", "classes")
        raise ModelError(f"classes: {counted(len(classes), 'name')} for a model of {expected}")


def _category_ids(classes: Sequence[str]) -> Sequence[int]:
    return COCO_CATEGORY_IDS if tuple(classes) == COCO_CLASSES else range(1, len(classes) + 1)


class SegmentationPredictor(Predictor):
    """For a `UPerNet`; see `Predictor`.

    An image's shorter side becomes `base_size[0]` unless the longer one would exceed `base_size[1]`; the map
    of classes has the image's own size. `SegmentedViews` does both, as in an evaluation. A tensor of floats
    is an image from which the mean is subtracted already, and which is divided by the deviation.

    Args:
        model: It is moved and converted.
        preprocessing: How images are decoded, mean and std; its size, crop and interpolation are not used.
        classes: Names of the classes.
        base_size: Shorter and longer side of the model's input.
        window: Side of windows that the model sees one after the other; None for the whole image at once.
        stride: Steps from window to window; None for two thirds of the window.
        device: As PyTorch names it; None for where the model is.
        dtype: A floating type; None for the model's.

    Raises:
        ModelError: The number of names is not that of the model's classes, or above 255.
        ValueError: The stride is larger than the window, or not positive.
    """

    task = "segmentation"
    batch_size = 1
    top = None

    def __init__(
        self,
        model: UPerNet,
        preprocessing: Preprocessing,
        classes: Sequence[str],
        *,
        base_size: tuple[int, int] = (512, 2048),
        window: int | None = None,
        stride: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_names(classes, model.num_classes)
        if len(classes) > 255:
            raise ModelError(f"classes: expected at most 255, got {len(classes)}")
        mean, std = (
            torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std)
        )

        def transform(image: DecodedImage) -> Tensor:
            return (as_floats(image) - mean) / std

        super().__init__(model, preprocessing, classes, transform=transform, device=device, dtype=dtype)
        short, long = base_size
        self.views = SegmentedViews(self.model, short, long, window=window, stride=stride)

    def run(self, inputs: Tensor, sizes: Sequence[Size]) -> list[Tensor | None]:
        """Maps of classes (h, w) at the images' sizes; None where logits are not finite."""
        labels = self.views.labels(inputs.to(self.device, self.dtype))
        return [
            each if finite else None for each, finite in zip(labels, self.views.finite.tolist(), strict=True)
        ]

    def decode(
        self, outputs: Sequence[Tensor | None], names: Sequence[str | None], top: int | None
    ) -> list[Prediction]:
        return [
            not_finite(name) if labels is None else self._segmentation(name, labels.cpu().numpy(), top)
            for name, labels in zip(names, outputs, strict=True)
        ]

    def _segmentation(self, name: str | None, labels: NDArray[np.uint8], top: int | None) -> Segmentation:
        pixels = np.bincount(labels.ravel(), minlength=len(self.classes))
        order = np.argsort(-pixels, kind="stable")[: np.count_nonzero(pixels)][:top]
        shares = [
            ClassShare(self.classes[index], index, int(pixels[index]) / labels.size)
            for index in order.tolist()
        ]
        return Segmentation(name, labels, shares)


def load_dense(
    checkpoint: Checkpoint,
    name: str | None,
    weights: Weights,
    classes: Sequence[str] | None,
    *,
    trained: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> DetectionPredictor | SegmentationPredictor:
    """The predictor for a file that holds only weights of a Mask R-CNN or a UPerNet; see `vmamba.load`.

    Args:
        checkpoint: With names of mmdet, mmseg or ours.
        name: Of the backbone; None to find the variant of VMamba that it is.
        weights: Which of the checkpoint's weights to load.
        classes: Names of the classes; None for the file's, for COCO's or ADE20K's where their number is the
            model's, or for numbers.
        trained: False leaves the weights as the architecture draws them.
        device: As PyTorch names it.
        dtype: A floating type.

    Raises:
        CheckpointError: The weights are of another architecture, or do not fit.
        ModelError: The backbone's name is unknown or must be given, or the number of names is wrong.
    """
    model = restore(checkpoint, name, weights, trained=trained)
    # mmdet and mmseg norm so, whatever the backbone.
    preprocessing = Preprocessing.of_model({}, mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    given = classes if classes is not None else checkpoint.classes
    if isinstance(model, MaskRCNN):
        names = given or _default_names(COCO_CLASSES, model.config.num_classes - 1)
        return DetectionPredictor(model, preprocessing, names, device=device, dtype=dtype)
    names = given or _default_names(ADE20K_CLASSES, model.num_classes)
    return SegmentationPredictor(model, preprocessing, names, device=device, dtype=dtype)


def _default_names(names: Sequence[str], number: int) -> list[str]:
    return list(names) if len(names) == number else [str(index) for index in range(number)]
