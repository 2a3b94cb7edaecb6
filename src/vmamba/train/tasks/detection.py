"""Detection and instance segmentation with Mask R-CNN."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vmamba.data.dense import DetectionAugment, DetectionDataset
from vmamba.data.sources import DetectionData
from vmamba.data.sources.coco import CocoSection
from vmamba.dense_inference import DetectionPredictor, mask_codes
from vmamba.heads.mask_rcnn import MaskRCNN, MaskRCNNConfig, recorded_logits
from vmamba.train.dense import DenseModelRecipe, DenseTask, create_backbone, load_recipe_weights, none_for_nan
from vmamba.train.detection_metrics import KINDS, SCORES, CocoMetric, no_objects
from vmamba.train.detection_reports import (
    JudgedDetections,
    draw_worst_detections,
    judge_detections,
    write_detection_report,
)
from vmamba.train.recipe import Recipe
from vmamba.train.task import SamplePrediction

_HEAD_NAMES = ("rpn.", "rpn_head.", "roi_heads.", "roi_head.")
"""How names begin of what a detector has beside its backbone: ours and mmdet's."""


class DetectorRecipe(DenseModelRecipe):
    """Mask R-CNN on a backbone; the defaults are the paper's."""

    channels: int = Field(default=256, ge=1, description="of the feature pyramid and the heads")
    hidden: int = Field(default=1024, ge=1, description="width of the box head")
    proposals: int = Field(default=1000, ge=1, description="most regions of an image that reach the heads")
    samples: int = Field(
        default=512,
        ge=1,
        description="regions of an image that the heads train on, at most a quarter of them on objects",
    )
    detections: int = Field(default=100, ge=1, description="most objects found in an image")
    score_threshold: float = Field(default=0.05, ge=0, lt=1, description="objects below it are dropped")


class DetectionRecipe(Recipe):
    """A recipe with `task: detection`."""

    task: Literal["detection"] = "detection"
    model: DetectorRecipe = DetectorRecipe()
    data: DetectionData = CocoSection()
    augment: DetectionAugment = DetectionAugment()


class DetectionTask(DenseTask):
    """Boxes and masks of objects, with Mask R-CNN."""

    name = "detection"
    recipe_type = DetectionRecipe
    monitor = "box_AP"

    def __init__(self, recipe: DetectionRecipe, classes: Sequence[str] | None = None) -> None:
        super().__init__(recipe, classes)
        if classes is None:
            self.category_ids = self._source("train").category_ids

    def dataset(self, split: Literal["train", "val"]) -> DetectionDataset:
        source = self._source(split)
        source.use_classes(self.classes)
        seed, limit = self.recipe.train.seed, self.recipe.data.limit
        if split == "train":
            source.report_empty_classes()
            return DetectionDataset(source, seed, self.recipe.augment, limit)
        dataset = DetectionDataset(source, seed, limit=limit)
        if not any(source.has_objects(index) for index in dataset.kept.tolist()):
            raise no_objects(len(dataset))  # now, and not after an epoch
        return dataset

    def build_model(self, recipe: DetectionRecipe) -> MaskRCNN:
        section, data = recipe.model, self.recipe.data
        backbone = create_backbone(section, self.preprocessing.channels)
        config = MaskRCNNConfig(
            num_classes=len(self.classes) + 1,
            channels=section.channels,
            hidden=section.hidden,
            min_size=data.short_side,
            max_size=data.long_side,
            resize_in_training=False,  # the augmentation does it
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
            proposals=section.proposals,
            samples=section.samples,
            detections=section.detections,
            score_threshold=section.score_threshold,
        )
        model = MaskRCNN(backbone, config)
        load_recipe_weights(model, backbone, section, _HEAD_NAMES)
        return model

    def frozen(self, model: nn.Module) -> nn.Module:
        frozen: nn.Module = model.backbone.body.model  # type: ignore[union-attr,assignment]
        return frozen

    def training_step(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = model(batch["images"], batch["targets"])
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def metrics(self) -> CocoMetric:
        """COCO's AP of boxes and masks."""
        return CocoMetric(self.classes)

    def report_metrics(self) -> CocoMetric:
        """The same, and tables: AP by class, precision by recall, and the confusion of classes."""
        return CocoMetric(self.classes, tables=True)

    def validation_step(
        self, model: nn.Module, batch: Mapping[str, Any], metrics: CocoMetric
    ) -> dict[str, Tensor] | None:
        return self._judge(model, batch, metrics)[0]

    def _judge(
        self, model: nn.Module, batch: Mapping[str, Any], metrics: CocoMetric
    ) -> tuple[dict[str, Tensor] | None, list[dict[str, Any]]]:
        """Detections with run-length codes, image by image: in a batch padding would change them.

        Returns:
            A loss of NaN if the outputs for an image are not finite, else None; and the detections.
        """
        detections, finite = [], True
        for image in batch["images"]:
            with recorded_logits(model) as logits:
                (one,) = model([image], paste=False)
            if not len(logits[0]) or not logits[0].isfinite().all():
                finite, one = False, {name: values[:0] for name, values in one.items()}
            height, width = image.shape[-2:]
            detections.append({**one, "masks": mask_codes(one["masks"], one["boxes"], (height, width))})
        metrics.update(detections, batch["objects"])
        return None if finite else {"loss": torch.tensor(float("nan"))}, detections

    def class_table(self, results: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        columns = [f"{kind}_{score}" for kind in KINDS for score in SCORES]
        values = torch.cat([results[f"{kind}_per_class"] for kind in KINDS], 1).tolist()
        return [
            {"name": name, **dict(zip(columns, map(none_for_nan, row), strict=True))}
            for name, row in zip(self.classes, values, strict=True)
        ]

    def report(self, results: Mapping[str, Tensor], folder: Path) -> None:
        """ap.csv, precision_recall.csv and .png, confusion.csv and .png."""
        write_detection_report(results, self.classes, folder)

    def report_step(
        self, model: nn.Module, batch: Mapping[str, Any], metrics: CocoMetric
    ) -> tuple[dict[str, Tensor] | None, list[JudgedDetections]]:
        losses, detections = self._judge(model, batch, metrics)
        pairs = zip(detections, batch["objects"], strict=True)
        return losses, [judge_detections(*pair, len(self.classes)) for pair in pairs]

    def report_predictions(self, predictions: Sequence[SamplePrediction], folder: Path) -> None:
        """worst.png: the images with the lowest F1, truth beside prediction."""
        draw_worst_detections(predictions, self.classes, self._source("val").load, folder / "worst.png")

    def predictor(self, model: Any) -> DetectionPredictor:
        return DetectionPredictor(model, self.preprocessing, self.classes, category_ids=self.category_ids)
