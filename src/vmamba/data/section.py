"""The section `data` of a recipe: the keys that all sources of images share."""

from abc import abstractmethod
from collections.abc import Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self

from vmamba.config import Section
from vmamba.data.annotated import AnnotatedImages
from vmamba.data.decoding import RGB, Decoding
from vmamba.data.preprocessing import Preprocessing
from vmamba.data.segmented import SegmentedImages
from vmamba.data.source import ClassifiedImages, ImageSource, class_weights
from vmamba.data.splitting import SplitImages
from vmamba.errors import DataError, RecipeError

Split = Literal["train", "val"]


class DataSection(Section):
    """Where images come from, and how they are preprocessed; a source adds its keys and `open`."""

    source: str
    root: str | None = Field(default=None, description="the folder that holds the splits")
    train_split: str = "train"
    val_split: str = "val"
    channels: int | None = Field(default=None, ge=1, description="of the input; null for the model's")
    mean: tuple[float, ...] | None = Field(
        default=None, strict=False, description="a value for each channel, or one; null for the model's"
    )
    std: tuple[float, ...] | None = Field(
        default=None, strict=False, description="a value for each channel, or one; null for the model's"
    )
    background: tuple[int, int, int] = Field(
        default=(255, 255, 255), strict=False, description="RGB, which shows through transparent pixels"
    )
    value_range: tuple[float, float] | None = Field(
        default=None,
        strict=False,
        description="what becomes black and white of pixels deeper than 8 bits; null for [0, 65535] of whole "
        "numbers and [0, 1] of floats",
    )
    float_images: bool = Field(
        default=False,
        description="keep all bits of deep pixels. Other channels than 1 and 3 always do",
    )

    @model_validator(mode="after")
    def _values_fit(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and self.channels is not None and len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        if self.std is not None and min(self.std, default=0.0) <= 0:
            raise ValueError(f"std {self.std} is not above 0")
        if not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background: expected three values from 0 to 255, got {self.background}")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range {self.value_range}: the first is not below the second")
        return self

    def preprocessing(self, model_or_cfg: Any) -> Preprocessing:
        """The preprocessing of a model, with the recipe's values in place of the model's.

        Args:
            model_or_cfg: As `Preprocessing.of_model`.

        Raises:
            RecipeError: A value does not fit the number of channels.
        """
        try:
            return Preprocessing.of_model(model_or_cfg, **self._preprocessing_values())
        except ValueError as error:
            raise RecipeError(f"data: {error}") from None

    def _preprocessing_values(self) -> dict[str, Any]:
        """The fields of `Preprocessing` that the section has a key for."""
        return {
            "channels": self.channels,
            "mean": self.mean,
            "std": self.std,
            "background": self.background,
            "value_range": self.value_range,
            "float_images": self.float_images,
        }

    def resolved(self, model_or_cfg: Any) -> Self:
        """The section with the values that it leaves to the model filled in; see `preprocessing`."""
        values = self.preprocessing(model_or_cfg)
        return self.model_copy(update={name: getattr(values, name) for name in ("channels", "mean", "std")})

    def without_training_split(self) -> Self:
        """The section for a machine with only the validation split, from which the classes are read then."""
        return self.model_copy(update={"train_split": self.val_split})

    @abstractmethod
    def open(self, split: Split, decoding: Decoding = RGB) -> ImageSource[Any]:
        """The images of a split.

        Args:
            split: "train" or "val".
            decoding: `preprocessing(…).decoding`.

        Raises:
            DataError: The data are missing or damaged.
            RecipeError: A key is missing that the source needs.
        """

    def _root(self) -> str:
        if self.root is None:
            raise RecipeError("data.root: missing; set it to the folder that holds the splits")
        return str(Path(self.root).expanduser()) if self.root.startswith("~") else self.root

    def _split_name(self, split: Split) -> Any:
        return self.train_split if split == "train" else self.val_split


class ClassificationSection(DataSection):
    """Images of one class each. A source implements `open_split`, and `open_all` if it can be split."""

    image_size: int | Annotated[tuple[int, int], Field(strict=False)] | None = Field(
        default=None,
        description="side, or [height, width], of the input in pixels; null for the model's",
    )
    crop_pct: float | None = Field(
        default=None,
        gt=0,
        le=2,
        description="of the resized image's side, in evaluation; null for the model's",
    )
    crop_mode: Literal["center", "squash", "border"] | None = Field(
        default=None,
        description="in evaluation: keep the ratio of the sides and crop, give it up, or pad; null for the "
        "model's",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = Field(
        default=None, description="null for the model's"
    )
    float_images: bool = Field(
        default=False,
        description="keep all bits of deep pixels; needs augment.auto_augment null and color_jitter 0. Other "
        "channels than 1 and 3 always do",
    )
    val_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="hold back this fraction of each class of the training split to evaluate on; there is no "
        "validation split then",
    )
    split_seed: int = Field(default=0, ge=0, description="of the choice of what is held back")
    sampling: Literal["uniform", "balanced"] = Field(
        default="uniform",
        description="'uniform': every training sample once an epoch; 'balanced': every class equally often",
    )
    class_weights: Literal["balanced"] | dict[str, float] | None = Field(
        default=None,
        description="of the loss: 'balanced' for inverse to the number of training samples, or a weight by "
        "the name of a class, 1 for those not named",
    )

    @field_validator("image_size")
    @classmethod
    def _large_enough(cls, size: int | tuple[int, int] | None) -> int | tuple[int, int] | None:
        if size is not None and min((size,) if isinstance(size, int) else size) < 8:
            raise ValueError(f"expected at least 8 pixels, got {size}")
        return size

    @field_validator("class_weights")
    @classmethod
    def _not_negative(cls, weights: Any) -> Any:
        if isinstance(weights, dict) and any(weight < 0 for weight in weights.values()):
            raise ValueError("expected weights of at least 0")
        return weights

    def _preprocessing_values(self) -> dict[str, Any]:
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return {
            **super()._preprocessing_values(),
            "size": size,
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }

    def resolved(self, model_or_cfg: Any) -> Self:
        values = self.preprocessing(model_or_cfg)
        height, width = values.size
        changes = {name: getattr(values, name) for name in ("interpolation", "crop_pct", "crop_mode")}
        changes["image_size"] = height if height == width else values.size
        return super().resolved(model_or_cfg).model_copy(update=changes)

    @abstractmethod
    def open_split(self, split: Split, decoding: Decoding) -> ClassifiedImages:
        """The images of a split that is stored as such."""

    def open_all(self, decoding: Decoding) -> ClassifiedImages:
        """The images that `val_fraction` divides into training and validation."""
        return self.open_split("train", decoding)

    def open(self, split: Split, decoding: Decoding = RGB) -> ClassifiedImages:
        if self.val_fraction is None:
            return self.open_split(split, decoding)
        return SplitImages(self.open_all(decoding), split, self.val_fraction, self.split_seed)

    def without_training_split(self) -> Self:
        return self if self.val_fraction is not None else super().without_training_split()

    def sampling_classes(self, source: ClassifiedImages) -> NDArray[np.int64] | None:
        """The class of each training sample, for `BalancedSampler`; None for uniform sampling.

        Raises:
            DataError: The labels cannot be read without fetching the images.
        """
        return source.labels() if self.sampling == "balanced" else None

    def loss_weights(self, source: ClassifiedImages) -> Tensor | None:
        """A weight for each class of the training source, for the loss; None where all count the same.

        Raises:
            DataError: The labels cannot be read without fetching the images, or a class is unknown.
        """
        if self.class_weights is None:
            return None
        if self.class_weights == "balanced":
            return class_weights(source.labels(), len(source.classes))
        unknown = [name for name in self.class_weights if name not in source.classes]
        if unknown:
            raise DataError(f"data.class_weights: {source} has no class {', '.join(map(repr, unknown))}")
        return Tensor([self.class_weights.get(name, 1.0) for name in source.classes])


class _DenseSection(DataSection):
    """What the sections of detection and segmentation share."""

    source: str
    short_side: int = Field(
        default=800,
        ge=1,
        description="of images in evaluation and prediction, in pixels: enlarged or reduced, they become as "
        "large as a shorter side of this and a longer one of long_side allow, and keep their ratio",
    )
    long_side: int = Field(default=1333, ge=1, description="see short_side")
    limit: int | None = Field(
        default=None,
        ge=1,
        description="take the first images of each split alone, in training the first of those that it does "
        "not leave out, for a first try",
    )

    @model_validator(mode="after")
    def _sides_are_ordered(self) -> Self:
        if self.short_side > self.long_side:
            raise ValueError(f"short_side {self.short_side} is above long_side {self.long_side}")
        return self


class DetectionSection(_DenseSection):
    """Images with annotated objects."""

    source: str

    @abstractmethod
    def open(self, split: Split, decoding: Decoding = RGB) -> AnnotatedImages: ...


class SegmentationSection(_DenseSection):
    """Images with a class for each pixel."""

    source: str
    short_side: int = Field(
        default=512, ge=1, description=_DenseSection.model_fields["short_side"].description
    )
    long_side: int = Field(default=2048, ge=1, description="their longer side at most")
    window: int | None = Field(
        default=None,
        ge=1,
        description="evaluate and predict by square windows of this side, and average where they overlap; "
        "null for the whole image",
    )
    stride: int | None = Field(
        default=None, ge=1, description="pixels between windows; null for two thirds of the window"
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.stride is not None and (self.window is None or self.stride > self.window):
            raise ValueError(f"stride {self.stride}: expected a window of at least as many pixels")
        return self

    @abstractmethod
    def open(self, split: Split, decoding: Decoding = RGB) -> SegmentedImages: ...


S = TypeVar("S", bound=DataSection)


def union_of_sources(base: type[S], default: str) -> Any:
    """The type of a recipe's section `data`: a union of a base's subclasses, chosen by `source`.

    Keys of other sources are dropped if they have those sources' defaults, because recipes written by earlier
    versions contain the keys of all sources.

    Args:
        base: The base class; its subclasses with a literal `source` must have been imported.
        default: The source of a section that names none.
    """
    kinds: dict[str, type[S]] = {}
    for kind in _subclasses(base):
        source = str(get_args(kind.model_fields["source"].annotation)[0])
        if source in kinds:
            raise TypeError(f"{kind.__name__}: {source!r} is the source of {kinds[source].__name__} already")
        kinds[source] = kind

    def prepare(values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = {"source": default, **values}
        kind = kinds.get(values["source"]) if isinstance(values["source"], str) else None
        if kind is None:
            return values
        return {key: value for key, value in values.items() if not _says_nothing(key, value, kind, kinds)}

    return Annotated[reduce(or_, kinds.values()), Field(discriminator="source"), BeforeValidator(prepare)]


def _says_nothing(
    key: str, value: Any, kind: type[DataSection], kinds: Mapping[str, type[DataSection]]
) -> bool:
    if key in kind.model_fields:
        return False
    fields = [other.model_fields[key] for other in kinds.values() if key in other.model_fields]
    return any(field.default == value for field in fields)


def _subclasses(base: type[S]) -> list[type[S]]:
    sections = []
    for kind in base.__subclasses__():
        sections += [kind] if get_args(kind.model_fields["source"].annotation) else _subclasses(kind)
    return sections
