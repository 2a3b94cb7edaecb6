"""Semantic segmentation with UPerNet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vmamba.data.dense import SegmentationAugment, SegmentationDataset
from vmamba.data.sources import SegmentationData
from vmamba.data.sources.ade20k import Ade20kSection
from vmamba.dense_inference import SegmentationPredictor
from vmamba.errors import RecipeError
from vmamba.heads.sliding import SegmentedViews
from vmamba.heads.upernet import UPerNet, upernet
from vmamba.train.dense import DenseModelRecipe, DenseTask, create_backbone, load_recipe_weights, none_for_nan
from vmamba.train.recipe import Recipe
from vmamba.train.segmentation_metrics import COLUMNS, IoUMetric
from vmamba.train.segmentation_reports import (
    JudgedSegmentation,
    draw_worst_segmentations,
    judge_segmentation,
    write_segmentation_report,
)
from vmamba.train.task import SamplePrediction

_HEAD_NAMES = ("decode_head.",)
"""How names begin of what a segmenter has beside its backbone, here and in mmseg."""


class SegmenterRecipe(DenseModelRecipe):
    """UPerNet on a backbone; the defaults are the paper's."""

    channels: int = Field(default=512, ge=1, description="of the head")
    aux_channels: int = Field(default=256, ge=1, description="of the auxiliary head")
    aux_weight: float = Field(default=0.4, ge=0, description="of the auxiliary head's loss")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="before the classifiers")


class SegmentationRecipe(Recipe):
    """A recipe with `task: segmentation`."""

    task: Literal["segmentation"] = "segmentation"
    model: SegmenterRecipe = SegmenterRecipe()
    data: SegmentationData = Ade20kSection()
    augment: SegmentationAugment = SegmentationAugment()


class SegmentationTask(DenseTask):
    """A class for each pixel, with UPerNet."""

    name = "segmentation"
    recipe_type = SegmentationRecipe
    monitor = "mIoU"
    least_at_once = 2

    def dataset(self, split: Literal["train", "val"]) -> SegmentationDataset:
        source = self._source(split)
        source.use_classes(self.classes)
        augment = self.recipe.augment if split == "train" else None
        return SegmentationDataset(
            source, self.preprocessing, self.recipe.train.seed, augment, self.recipe.data.limit
        )

    def build_model(self, recipe: SegmentationRecipe) -> UPerNet:
        section = recipe.model
        backbone = create_backbone(section, self.preprocessing.channels)
        model = upernet(
            backbone,
            len(self.classes),
            channels=section.channels,
            aux_channels=section.aux_channels,
            aux_weight=section.aux_weight,
            dropout=section.dropout,
        )
        load_recipe_weights(model, backbone, section, _HEAD_NAMES)
        return model

    def frozen(self, model: nn.Module) -> nn.Module:
        frozen: nn.Module = model.backbone.model  # type: ignore[union-attr,assignment]
        return frozen

    def training_step(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model(batch["images"], batch["labels"])
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def metrics(self) -> IoUMetric:
        """mIoU and pixel accuracy."""
        return IoUMetric(self.classes)

    def report_metrics(self) -> IoUMetric:
        """The same, and tables of all classes and their confusion."""
        return IoUMetric(self.classes, tables=True)

    def _views(self, model: nn.Module, **options: Any) -> SegmentedViews:
        data = self.recipe.data
        try:
            return SegmentedViews(
                model, data.short_side, data.long_side, window=data.window, stride=data.stride, **options
            )
        except ValueError as error:
            raise RecipeError(f"data: {error}") from None

    def validation_step(
        self, model: nn.Module, batch: Mapping[str, Any], metrics: IoUMetric
    ) -> dict[str, Tensor] | None:
        return self._judge(model, batch, metrics)[0]

    def _judge(
        self, model: nn.Module, batch: Mapping[str, Any], metrics: IoUMetric
    ) -> tuple[dict[str, Tensor] | None, list[Tensor]]:
        """The class of each pixel, image by image: their sizes differ, and padding would change them.

        Returns:
            A loss of NaN if the logits of an image are not finite, else None; and the classes of each image.
        """
        views = model if isinstance(model, SegmentedViews) else self._views(model)
        predicted, finite = [], True
        for image, labels in zip(batch["images"], batch["labels"], strict=True):
            predicted.append(views.labels(image[None])[0])
            finite = finite and bool(views.finite.all())
            metrics.update(predicted[-1], labels)
        return None if finite else {"loss": torch.tensor(float("nan"))}, predicted

    def class_table(self, results: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        rows = zip(self.classes, results["per_class"].tolist(), strict=True)
        return [
            {"name": name, **dict(zip(COLUMNS, map(none_for_nan, values), strict=True))}
            for name, values in rows
        ]

    def report(self, results: Mapping[str, Tensor], folder: Path) -> None:
        """iou.csv, confusion.csv and confusion.png."""
        write_segmentation_report(results, self.classes, folder)

    def report_step(
        self, model: nn.Module, batch: Mapping[str, Any], metrics: IoUMetric
    ) -> tuple[dict[str, Tensor] | None, list[JudgedSegmentation]]:
        losses, predicted = self._judge(model, batch, metrics)
        pairs = zip(predicted, batch["labels"], strict=True)
        return losses, [judge_segmentation(*pair, len(self.classes)) for pair in pairs]

    def report_predictions(self, predictions: Sequence[SamplePrediction], folder: Path) -> None:
        """worst.png: the images with the lowest mean IoU, truth beside prediction."""
        draw_worst_segmentations(predictions, self.classes, self._source("val").load, folder / "worst.png")

    def averaged(self, model: nn.Module, flip: bool, scales: Sequence[float]) -> nn.Module:
        return self._views(model, flip=flip, scales=scales)

    def predictor(self, model: Any) -> SegmentationPredictor:
        data = self.recipe.data
        return SegmentationPredictor(
            model,
            self.preprocessing,
            self.classes,
            base_size=(data.short_side, data.long_side),
            window=data.window,
            stride=data.stride,
        )
