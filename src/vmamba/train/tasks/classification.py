"""Image classification."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from PIL import Image
from pydantic import Field, field_validator, model_validator
from timm.data import Mixup, create_transform
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from vmamba.data import (
    ClassificationDataset,
    HuggingFaceImages,
    ImageFolder,
    ImageSource,
    MnistSubset,
    RemoteShards,
    Shards,
    TarImages,
    find_shards,
    is_url,
    read_classes,
)
from vmamba.data.augment import keep_a_bit
from vmamba.errors import DataError, RecipeError
from vmamba.train.averaging import AveragedViews
from vmamba.train.confusion import ClassResult, draw_confusion, per_class, write_csv
from vmamba.train.guard import NonFiniteError
from vmamba.train.model import create_model, require_model
from vmamba.train.recipe import Recipe, Section
from vmamba.train.task import Prediction, Task


class DataRecipe(Section):
    """Where the images come from and what the model sees of them."""

    source: Literal["folder", "tar", "webdataset", "huggingface", "mnist"] = Field(
        default="folder",
        description="'folder': root/<split>/<class>/<image>; 'tar': such a folder in the tar root/<split>; "
        "'webdataset': shards root/<split>; 'huggingface': what load_from_disk or load_dataset of the "
        "package datasets take as root; 'mnist': built in",
    )
    root: str | None = Field(
        default=None, description="a folder; for 'webdataset' also an address such as s3://bucket/folder"
    )
    train_split: str | list[str] = Field(
        default="train", description="for 'webdataset' patterns of shards, such as train-{000000..001023}.tar"
    )
    val_split: str | list[str] = "val"
    classes: str | int | None = Field(
        default=None,
        description="for 'webdataset', and 'huggingface' without names: a text file with a name a line, or "
        "the number of classes",
    )
    image_column: str = Field(default="image", description="of 'huggingface'")
    label_column: str = Field(default="label", description="of 'huggingface'")
    shuffle_shards: int = Field(
        default=16, ge=1, description="shards in object storage whose samples an epoch mixes"
    )
    cache_dir: str | None = Field(
        default=None, description="folder for shards from object storage, on a local disk"
    )
    cache_gb: float = Field(default=100, gt=0, description="size in 10⁹ bytes that it is kept below")
    channels: Literal[1, 3] = 3
    image_size: int | None = Field(
        default=None, ge=8, description="null, here and below, for what the model's own configuration says"
    )
    crop_pct: float | None = Field(
        default=None, gt=0, le=1, description="of the resized image's side, in evaluation"
    )
    interpolation: Literal["bicubic", "bilinear"] | None = None
    mean: tuple[float, ...] | None = Field(default=None, strict=False)
    std: tuple[float, ...] | None = Field(default=None, strict=False)

    @model_validator(mode="after")
    def _a_value_each_channel(self) -> "DataRecipe":
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {self.std} is not above 0")
        return self

    @model_validator(mode="after")
    def _of_the_source(self) -> "DataRecipe":
        if self.source != "webdataset":
            for name in ("train_split", "val_split"):
                if not isinstance(getattr(self, name), str):
                    raise ValueError(
                        f"{name}: a list is for source 'webdataset', and this is {self.source!r}"
                    )
            if self.classes is not None and self.source != "huggingface":
                raise ValueError(f"classes: source {self.source!r} names them itself; leave it out")
        elif self.classes is None:
            raise ValueError("classes: missing; a text file with a name a line, or the number of classes")
        elif self.root is not None and is_url(self.root) and self.cache_dir is None:
            raise ValueError(f"cache_dir: missing; shards from {self.root} are kept there")
        if isinstance(self.classes, int) and self.classes < 1:
            raise ValueError(f"classes: expected at least 1, got {self.classes}")
        return self


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
    def _known_policy(cls, policy: str | None) -> str | None:
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
    data: DataRecipe = DataRecipe()
    augment: AugmentRecipe = AugmentRecipe()

    @model_validator(mode="after")
    def _mixup_has_pairs(self) -> "ClassificationRecipe":
        if (self.augment.mixup or self.augment.cutmix) and self.train.batch_size % 2:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is odd; Mixup and CutMix pair a batch's images"
            )
        return self


@dataclass(frozen=True)
class ClassScore:
    """A class and the probability given to it."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification(Prediction):
    """The classes of an image, the likeliest first."""

    classes: list[ClassScore]

    def text(self, top: int) -> str:
        return ", ".join(f"{c.label} {c.score:.1%}" for c in self.classes[:top])


class ClassificationTask(Task):
    """Images of one class each; softmax cross-entropy, with Mixup and CutMix where the recipe asks."""

    name = "classification"
    recipe_type = ClassificationRecipe
    monitor = "top1"

    def __init__(self, recipe: ClassificationRecipe, classes: Sequence[str] | None = None) -> None:
        self.recipe: Any = self.resolve(recipe)
        self._sources: dict[str, ImageSource] = {}
        self.classes = list(classes) if classes is not None else self._source("train").classes
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

    @classmethod
    def resolve(cls, recipe: ClassificationRecipe) -> ClassificationRecipe:
        """Size, crop, interpolation, mean and std from the model's pretrained configuration."""
        data = recipe.data
        require_model(recipe.model.name)
        cfg: Any = timm.get_pretrained_cfg(recipe.model.name)
        cfg = PretrainedCfg() if cfg is None else cfg
        mean, std = (_for_channels(values, data.channels) for values in (cfg.mean, cfg.std))
        # timm has more interpolations than the recipe: "random" is for training, others are rare.
        interpolation = cfg.interpolation if cfg.interpolation == "bilinear" else "bicubic"
        defaults = {"image_size": cfg.input_size[-1], "crop_pct": cfg.crop_pct, "mean": mean, "std": std}
        defaults["interpolation"] = interpolation
        missing = {name: value for name, value in defaults.items() if getattr(data, name) is None}
        return recipe.model_copy(update={"data": data.model_copy(update=missing)})

    def _source(self, split: str) -> ImageSource:
        if split not in self._sources:
            self._sources[split] = self._open(split)
        return self._sources[split]

    def _open(self, split: str) -> ImageSource:
        data = self.recipe.data
        mode = "RGB" if data.channels == 3 else "L"
        if data.source == "mnist":
            return MnistSubset(split, mode)
        if data.root is None:
            raise RecipeError("data.root: missing; set it to the folder that holds the splits")
        chosen = data.train_split if split == "train" else data.val_split
        classes = None if data.classes is None else read_classes(data.classes)
        if isinstance(chosen, str) and data.source == "huggingface":
            return HuggingFaceImages(
                *(data.root, chosen),
                image_column=data.image_column,
                label_column=data.label_column,
                classes=classes,
                mode=mode,
            )
        if isinstance(chosen, str) and data.source != "webdataset":
            path = Path(data.root) / chosen
            return TarImages(path, mode) if data.source == "tar" else ImageFolder(path, mode)
        assert classes is not None  # by the recipe's validator
        shards = find_shards(data.root, [chosen] if isinstance(chosen, str) else chosen)
        if not is_url(data.root):
            return Shards(shards, classes, mode)
        assert data.cache_dir is not None
        return RemoteShards(
            *(shards, classes, mode),
            cache_dir=data.cache_dir,
            cache_gb=data.cache_gb,
            window=data.shuffle_shards,
        )

    def transform(self, training: bool) -> Any:
        """From a PIL image to a normed tensor (channels, side, side), `train_size` or `image_size` a side."""
        data, augment = self.recipe.data, self.recipe.augment
        side = (training and augment.train_size) or data.image_size
        common: dict[str, Any] = {
            "input_size": (data.channels, side, side),
            "interpolation": data.interpolation,
            "mean": data.mean,
            "std": data.std,
        }
        if not training:
            return create_transform(**common, is_training=False, crop_pct=data.crop_pct)
        transform = keep_a_bit(
            create_transform(
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
        )
        if augment.rotate or augment.shear:
            affine = RandomAffine(
                augment.rotate, shear=augment.shear, interpolation=InterpolationMode.BILINEAR
            )
            return Compose([affine, transform])
        return transform

    def dataset(self, split: str) -> ClassificationDataset:
        source = self._source(split)
        if source.classes != self.classes:
            missing = [name for name in self.classes if name not in source.classes]
            extra = [name for name in source.classes if name not in self.classes]
            raise DataError(
                f"{source}: not the model's {len(self.classes)} classes; missing {missing}, extra {extra}"
            )
        return ClassificationDataset(source, self.transform(split == "train"), self.recipe.train.seed)

    def build_model(self, recipe: ClassificationRecipe) -> nn.Module:
        data = self.resolve(recipe).data
        assert data.image_size is not None
        model: Any = create_model(
            recipe.model,
            num_classes=len(self.classes),
            in_chans=data.channels,
            image_size=(data.image_size, data.image_size),
        )
        # What timm reads, from the model or from an export of it: as the run has it, not as the registry.
        cfg = {
            "num_classes": len(self.classes),
            "input_size": (data.channels, data.image_size, data.image_size),
            "crop_pct": data.crop_pct,
            "interpolation": data.interpolation,
            "mean": data.mean,
            "std": data.std,
            "label_names": list(self.classes),
        }
        model.pretrained_cfg = model.default_cfg = {**getattr(model, "pretrained_cfg", {}), **cfg}
        return model

    def augment_batch(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mixup or CutMix of neighbours (2k, 2k + 1), drawn once; labels become (B, classes), smoothed."""
        if self.mixup is None:
            return batch
        images, labels = batch
        # timm pairs the first with the last, the second with the last but one, …
        pairs = torch.arange(len(labels), device=labels.device).unflatten(0, (-1, 2)).unbind(1)
        order = torch.cat([pairs[0], pairs[1].flip(0)])
        return self.mixup(images[order], labels[order])

    def training_step(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, targets = batch
        logits = model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels, smoothing = targets, self.recipe.augment.label_smoothing
        if targets.ndim == 2:  # mixed, and smoothed already
            labels, targets, smoothing = targets.argmax(1), targets.to(logits), 0.0
        return {
            "loss": F.cross_entropy(logits, targets, label_smoothing=smoothing),
            "accuracy": (logits.argmax(1) == labels).float().mean(),
        }

    def metrics(self) -> Any:
        """Accuracies: of the likeliest class, and of the five likeliest."""
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy

        number = max(2, len(self.classes))  # torchmetrics takes no fewer
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(number, average="micro"),
                "top5": MulticlassAccuracy(number, top_k=min(5, number), average="micro"),
            }
        )

    @classmethod
    def without_training_data(cls, recipe: ClassificationRecipe) -> ClassificationRecipe:
        data = recipe.data.model_copy(update={"train_split": recipe.data.val_split})
        return recipe.model_copy(update={"data": data})

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
        logits = model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels)
        if len(self.classes) == 1:  # torchmetrics takes at least two: a second one that is never likely
            logits = F.pad(logits, (0, 1), value=-1e4)
        metrics.update(logits.float(), labels)
        return {"loss": loss}

    def report(self, results: Mapping[str, Tensor], folder: Path) -> None:
        """per_class.csv, confusion.csv and confusion.png."""
        number = len(self.classes)
        confusion = results["confusion"][:number, :number]
        columns = [field.name for field in fields(ClassResult)]
        rows = [astuple(result) for result in per_class(confusion, self.classes)]
        write_csv(folder / "per_class.csv", columns, rows)
        counts = [[name, *row] for name, row in zip(self.classes, confusion.tolist(), strict=True)]
        write_csv(folder / "confusion.csv", ["true class", *self.classes], counts)
        draw_confusion(confusion, self.classes, folder / "confusion.png")

    def averaged(self, model: nn.Module, flip: bool, scales: Sequence[float]) -> nn.Module:
        return AveragedViews(model, flip, scales)

    def predictor(self, model: nn.Module) -> Callable[[Sequence[Image.Image]], list[Prediction]]:
        transform = self.transform(training=False)
        mode = "RGB" if self.recipe.data.channels == 3 else "L"
        device = next(model.parameters()).device

        def predict(images: Sequence[Image.Image]) -> list[Prediction]:
            batch = torch.stack([transform(image.convert(mode)) for image in images]).to(device)
            with torch.inference_mode():
                probabilities = model(batch).float().softmax(1).cpu()
            if not probabilities.isfinite().all():
                raise NonFiniteError("the model's outputs are not finite; try it in float32")
            return [self._classification(row) for row in probabilities]

        return predict

    def _classification(self, probabilities: Tensor) -> Classification:
        order = probabilities.argsort(descending=True).tolist()
        return Classification([ClassScore(self.classes[i], probabilities[i].item()) for i in order])


def _for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A value for each channel; where the model was made for others, their mean."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
