"""Image classification."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from vmamba.data import ClassificationDataset, ImageFolder, ImageSource, MnistSubset
from vmamba.errors import RecipeError
from vmamba.train.recipe import Recipe, Section
from vmamba.train.task import ClassScore, Task, create_model, register_task


class DataRecipe(Section):
    """Where the images come from and what the model sees of them."""

    source: Literal["folder", "mnist"] = Field(
        "folder", description="'folder': root/<split>/<class>/<image>; 'mnist': built in"
    )
    root: str | None = None
    train_split: str = "train"
    val_split: str = "val"
    channels: Literal[1, 3] = 3
    image_size: int = Field(224, ge=8)
    crop_pct: float = Field(0.875, gt=0, le=1, description="of the resized image's side, in evaluation")
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), strict=False)
    std: tuple[float, ...] = Field((0.229, 0.224, 0.225), strict=False)


class AugmentRecipe(Section):
    """timm's augmentation; the defaults are the paper's."""

    scale: tuple[float, float] = Field((0.08, 1.0), strict=False, description="area of the random crop")
    ratio: tuple[float, float] = Field((0.75, 4 / 3), strict=False)
    hflip: float = Field(0.5, ge=0, le=1)
    color_jitter: float = Field(0.4, ge=0)
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    random_erasing: float = Field(0.25, ge=0, le=1)
    mixup: float = Field(0.8, ge=0)
    cutmix: float = Field(1.0, ge=0)
    mixup_prob: float = Field(1.0, ge=0, le=1)
    mixup_switch_prob: float = Field(0.5, ge=0, le=1)
    label_smoothing: float = Field(0.1, ge=0, lt=1)


class ClassificationRecipe(Recipe):
    """A recipe with `task: classification`."""

    task: Literal["classification"] = "classification"
    data: DataRecipe = Field(default_factory=DataRecipe)
    augment: AugmentRecipe = Field(default_factory=AugmentRecipe)


@dataclass(frozen=True)
class Classification:
    """The classes of an image, the likeliest first."""

    classes: list[ClassScore]


@register_task
class ClassificationTask(Task):
    """Images of one class each; softmax cross-entropy, with Mixup and CutMix where the recipe asks."""

    name = "classification"
    recipe_type = ClassificationRecipe
    monitor = "top1"

    def __init__(self, recipe: ClassificationRecipe, classes: Sequence[str] | None = None) -> None:
        self.recipe = recipe
        self._sources: dict[str, ImageSource] = {}
        self.classes = list(classes) if classes is not None else self._source("train").classes
        augment = recipe.augment
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

    def _source(self, split: str) -> ImageSource:
        if split not in self._sources:
            data = self.recipe.data
            mode = "RGB" if data.channels == 3 else "L"
            if data.source == "mnist":
                self._sources[split] = MnistSubset(split, mode)
            else:
                if data.root is None:
                    raise RecipeError("data.root: missing; set it to the folder that holds the splits")
                folder = data.train_split if split == "train" else data.val_split
                known = None if split == "train" else self.classes
                self._sources[split] = ImageFolder(Path(data.root) / folder, mode, known)
        return self._sources[split]

    def transform(self, training: bool) -> Any:
        """From a PIL image to a normed tensor (channels, image_size, image_size)."""
        data, augment = self.recipe.data, self.recipe.augment
        common: dict[str, Any] = {
            "input_size": (data.channels, data.image_size, data.image_size),
            "interpolation": data.interpolation,
            "mean": data.mean,
            "std": data.std,
        }
        if not training:
            return create_transform(**common, is_training=False, crop_pct=data.crop_pct)
        return create_transform(
            **common,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter,
            auto_augment=augment.auto_augment,
            re_prob=augment.random_erasing,
            re_mode="pixel",
        )

    def dataset(self, split: str) -> ClassificationDataset:
        return ClassificationDataset(
            self._source(split), self.transform(split == "train"), self.recipe.train.seed
        )

    def build_model(self, recipe: ClassificationRecipe) -> nn.Module:
        return create_model(recipe.model, num_classes=len(self.classes), in_chans=recipe.data.channels)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        if self.mixup is not None and len(images) % 2 == 0:  # it pairs the batch with itself reversed
            images, targets = self.mixup(images, labels)
            return {"loss": SoftTargetCrossEntropy()(model(images).float(), targets)}
        logits = model(images).float()
        smoothing = self.recipe.augment.label_smoothing
        return {
            "loss": F.cross_entropy(logits, labels, label_smoothing=smoothing),
            "accuracy": (logits.argmax(1) == labels).float().mean().detach(),
        }

    def metrics(self) -> MetricCollection:
        number = len(self.classes)
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(number, average="micro"),
                "top5": MulticlassAccuracy(number, top_k=min(5, number), average="micro"),
            }
        )

    def evaluate(self, model: nn.Module, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> None:
        images, labels = batch
        metrics.update(model(images).float(), labels)

    def predict(self, model: nn.Module, images: Sequence[Image.Image]) -> list[Classification]:
        transform = self.transform(training=False)
        mode = "RGB" if self.recipe.data.channels == 3 else "L"
        device = next(model.parameters()).device
        batch = torch.stack([transform(image.convert(mode)) for image in images]).to(device)
        with torch.inference_mode():
            scores = model.eval()(batch).float().softmax(1).cpu()
        return [
            Classification(
                [ClassScore(self.classes[i], row[i].item()) for i in row.argsort(descending=True).tolist()]
            )
            for row in scores
        ]
