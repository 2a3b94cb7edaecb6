"""Image classification."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from pydantic import Field, field_validator, model_validator
from timm.data import Mixup, create_transform
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from vmamba.config import Section
from vmamba.data import (
    ClassificationData,
    ClassificationDataset,
    ClassifiedImages,
    FolderSection,
    Preprocessing,
)
from vmamba.data.augment import skip_posterize_to_zero_bits
from vmamba.errors import RecipeError
from vmamba.inference import ClassificationPredictor
from vmamba.pretrained import set_configuration
from vmamba.train.averaging import AveragedViews
from vmamba.train.confusion import ClassResult, draw_confusion, per_class, write_csv
from vmamba.train.model import create_model, require_model
from vmamba.train.predictions import (
    PredictedClasses,
    draw_mistakes,
    most_confident_mistakes,
    predicted_classes,
    write_predictions,
)
from vmamba.train.recipe import Recipe
from vmamba.train.task import SamplePrediction, Task

log = logging.getLogger(__name__)


class AugmentRecipe(Section):
    """timm's augmentation; the defaults are the paper's."""

    scale: tuple[float, float] = Field(
        default=(0.08, 1.0), strict=False, description="area of the random crop"
    )
    ratio: tuple[float, float] = Field(default=(0.75, 4 / 3), strict=False)
    train_size: int | None = Field(
        default=None,
        ge=8,
        description="side in pixels that the random crop is resized to; null for data.image_size. Smaller "
        "trains faster, and can judge better: objects look larger in a crop (arXiv 1906.06423)",
    )
    rotate: float = Field(default=0.0, ge=0, le=180, description="largest angle, in degrees either way")
    shear: float = Field(default=0.0, ge=0, lt=90, description="largest angle, in degrees either way")
    hflip: float = Field(default=0.5, ge=0, le=1)
    color_jitter: float = Field(default=0.4, ge=0)
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = Field(default=0.25, ge=0, le=1)
    mixup: float = Field(default=0.8, ge=0)
    cutmix: float = Field(default=1.0, ge=0)
    mixup_prob: float = Field(default=1.0, ge=0, le=1)
    mixup_switch_prob: float = Field(default=0.5, ge=0, le=1)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)

    @field_validator("auto_augment")
    @classmethod
    def _is_timm_policy(cls, policy: str | None) -> str | None:
        try:
            create_transform(32, is_training=True, auto_augment=policy)
        except (AssertionError, ValueError, KeyError) as error:
            raise ValueError(f"{policy!r} is no policy of timm's ({error})") from error
        return policy

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentRecipe":
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"{name} [{low}, {high}] is not a range of positive numbers")
        return self


class ClassificationRecipe(Recipe):
    """A recipe with `task: classification`."""

    task: Literal["classification"] = "classification"
    data: ClassificationData = FolderSection()
    augment: AugmentRecipe = AugmentRecipe()

    @model_validator(mode="after")
    def _mixup_has_pairs(self) -> "ClassificationRecipe":
        if (self.augment.mixup or self.augment.cutmix) and self.train.batch_size % 2:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is odd; Mixup and CutMix pair a batch's images"
            )
        return self


class ClassificationTask(Task):
    """Images of one class each; softmax cross-entropy, with Mixup and CutMix where the recipe asks."""

    name = "classification"
    recipe_type = ClassificationRecipe
    monitor = "top1"

    def __init__(self, recipe: ClassificationRecipe, classes: Sequence[str] | None = None) -> None:
        self.recipe: Any = self.resolve(recipe)
        self.preprocessing: Preprocessing = self.recipe.data.preprocessing(_configuration(self.recipe))
        self._sources: dict[str, ClassifiedImages] = {}
        self.classes = list(classes) if classes is not None else self._source("train").classes
        if classes is None and len(self.classes) == 1:
            log.warning(
                "the data have one class alone, %r: every score will be perfect, and the model learns "
                "nothing; give it two classes or more to tell apart",
                self.classes[0],
            )
        augment = self.recipe.augment
        self.mixup = None
        if augment.mixup > 0 or augment.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=augment.mixup,
                cutmix_alpha=augment.cutmix,
                prob=augment.mixup_prob,
                switch_prob=augment.mixup_switch_prob,
                label_smoothing=augment.label_smoothing,
                num_classes=len(self.classes),
            )
        self.needs_pairs = self.mixup is not None

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.recipe.data.channels, *self.preprocessing.size)

    @classmethod
    def resolve(cls, recipe: ClassificationRecipe) -> ClassificationRecipe:
        """Channels, size, crop, interpolation, mean and std from the model's pretrained configuration."""
        data = recipe.data.resolved(_configuration(recipe))
        return recipe.model_copy(update={"data": data})

    @classmethod
    def without_training_data(cls, recipe: ClassificationRecipe) -> ClassificationRecipe:
        return recipe.model_copy(update={"data": recipe.data.without_training_split()})

    def _source(self, split: Literal["train", "val"]) -> ClassifiedImages:
        if split not in self._sources:
            self._sources[split] = self.recipe.data.open(split, self.preprocessing.decoding)
        return self._sources[split]

    def transform(self, training: bool) -> Any:
        """From a decoded image to a normed tensor (c, h, w), of `train_size` or `image_size`."""
        augment = self.recipe.augment
        if not training:
            return self.preprocessing.transform()
        if self.preprocessing.decoding.to_tensor and (augment.auto_augment or augment.color_jitter):
            raise RecipeError(
                "augment: auto_augment and color_jitter are for 8-bit images of 1 or 3 channels; set "
                "augment.auto_augment=null and augment.color_jitter=0"
            )
        preprocessing = self.preprocessing
        if augment.train_size is not None:
            preprocessing = replace(preprocessing, size=(augment.train_size, augment.train_size))
        transform = skip_posterize_to_zero_bits(
            create_transform(
                **preprocessing.timm_arguments(),
                is_training=True,
                scale=augment.scale,
                ratio=augment.ratio,
                hflip=augment.hflip,
                color_jitter=augment.color_jitter,
                auto_augment=augment.auto_augment,
                re_prob=augment.random_erasing,
                re_mode="pixel",
            )
        )
        if augment.rotate or augment.shear:
            affine = RandomAffine(
                augment.rotate, shear=augment.shear, interpolation=InterpolationMode.BILINEAR
            )
            return Compose([affine, transform])
        return transform

    def dataset(self, split: Literal["train", "val"]) -> ClassificationDataset:
        source = self._source(split)
        source.use_classes(self.classes)
        source.report_empty_classes()
        training = split == "train"
        balance = self.recipe.data.sampling_classes(source) if training else None
        return ClassificationDataset(source, self.transform(training), self.recipe.train.seed, balance)

    @cached_property
    def class_weights(self) -> Tensor | None:
        """The classes' weights in the loss, (classes,); None if all count the same."""
        if self.recipe.data.class_weights is None:
            return None
        source = self._source("train")
        source.use_classes(self.classes)
        return self.recipe.data.loss_weights(source)

    def build_model(self, recipe: ClassificationRecipe) -> nn.Module:
        model = create_model(
            recipe.model,
            num_classes=len(self.classes),
            in_chans=self.preprocessing.channels,
            image_size=self.preprocessing.size,
        )
        set_configuration(model, self.preprocessing, self.classes)
        return model

    def augment_batch(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mixup or CutMix of neighbours (2i, 2i + 1), drawn once; labels become (b, classes), smoothed."""
        if self.mixup is None:
            return batch
        images, labels = batch
        # timm pairs the first with the last, the second with the last but one, …
        pairs = torch.arange(len(labels), device=labels.device).unflatten(0, (-1, 2)).unbind(1)
        order = torch.cat([pairs[0], pairs[1].flip(0)])
        return self.mixup(images[order], labels[order])

    def training_step(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        logits = _logits(model, images)
        labels, smoothing = targets, self.recipe.augment.label_smoothing
        if targets.ndim == 2:  # mixed, and smoothed already
            labels, targets, smoothing = targets.argmax(1), targets.to(logits), 0.0
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        return {
            "loss": F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing),
            "accuracy": (logits.argmax(1) == labels).float().mean(),
        }

    def metrics(self) -> Any:
        """Top-1 and top-5 accuracy."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        number = max(2, len(self.classes))  # torchmetrics requires at least two
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(number, average="micro"),
                "top5": MulticlassAccuracy(number, top_k=min(5, number), average="micro"),
            }
        )

    def report_metrics(self) -> Any:
        """top1, top5, the expected calibration error over 15 bins of confidence, and the confusion matrix."""
        from torchmetrics.classification import MulticlassConfusionMatrix

        from vmamba.train.metrics import CalibrationError

        number = max(2, len(self.classes))
        metrics = self.metrics()
        metrics.add_metrics(
            {
                "calibration_error": CalibrationError(number, n_bins=15, norm="l1"),
                "confusion": MulticlassConfusionMatrix(number),  # a row for each true class
            }
        )
        return metrics

    def validation_step(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], metrics: Any
    ) -> dict[str, Tensor]:
        images, labels = batch
        return self._score(_logits(model, images), labels, metrics)

    def _score(self, logits: Tensor, labels: Tensor, metrics: Any) -> dict[str, Tensor]:
        loss = F.cross_entropy(logits, labels)
        if len(self.classes) == 1:  # torchmetrics requires two: add one that is never predicted
            logits = F.pad(logits, (0, 1), value=-1e4)
        metrics.update(logits.float(), labels)
        return {"loss": loss}

    def report_step(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], metrics: Any
    ) -> tuple[dict[str, Tensor], list[PredictedClasses]]:
        images, labels = batch
        logits = _logits(model, images)
        return self._score(logits, labels, metrics), predicted_classes(logits, labels)

    def class_table(self, results: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        number = len(self.classes)
        return [asdict(row) for row in per_class(results["confusion"][:number, :number], self.classes)]

    def report(self, results: Mapping[str, Tensor], folder: Path) -> None:
        """per_class.csv, confusion.csv and confusion.png."""
        number = len(self.classes)
        confusion = results["confusion"][:number, :number]
        columns = [field.name for field in fields(ClassResult)]
        rows = [list(row.values()) for row in self.class_table(results)]
        write_csv(folder / "per_class.csv", columns, rows)
        counts = [[name, *row] for name, row in zip(self.classes, confusion.tolist(), strict=True)]
        write_csv(folder / "confusion.csv", ["true class", *self.classes], counts)
        draw_confusion(confusion, self.classes, folder / "confusion.png")

    def report_predictions(self, predictions: Sequence[SamplePrediction], folder: Path) -> None:
        """predictions.csv, and mistakes.csv and mistakes.png with the most confident first."""
        write_predictions(predictions, self.classes, folder / "predictions.csv")
        mistakes = most_confident_mistakes(predictions)
        write_predictions(mistakes, self.classes, folder / "mistakes.csv")
        draw_mistakes(mistakes, self.classes, self._source("val").image, folder / "mistakes.png")

    def averaged(self, model: nn.Module, flip: bool, scales: Sequence[float]) -> nn.Module:
        return AveragedViews(model, flip, scales)

    def predictor(self, model: nn.Module) -> ClassificationPredictor:
        return ClassificationPredictor(model, self.preprocessing, self.classes)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs, in at least float32."""
    logits: Tensor = model(images)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _configuration(recipe: ClassificationRecipe) -> Any:
    """timm's pretrained configuration of the model."""
    require_model(recipe.model.name)
    return timm.get_pretrained_cfg(recipe.model.name)
