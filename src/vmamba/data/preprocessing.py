"""From an image file to a model's input, in evaluation and prediction."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from timm.data import create_transform
from timm.data.constants import (
    DEFAULT_CROP_MODE,
    DEFAULT_CROP_PCT,
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
)
from torch import Tensor, nn

from vmamba.data.decoding import DecodedImage, Decoding, read_image

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input.

    Attributes:
        channels: Channels of the input.
        size: Height and width of the input, in pixels.
        mean: Subtracted from pixels in [0, 1]: a value for each channel, or one for all.
        std: Divides the result: a value for each channel, or one for all.
        interpolation: For resizing; one of `INTERPOLATIONS`.
        crop_pct: Side of the crop as a fraction of the resized image's; above 1 the image gets a border.
        crop_mode: As in timm: "center" keeps the aspect ratio and crops, "squash" changes the ratio, "border"
            pads.
        background: RGB from 0 to 255 behind transparent pixels.
        value_range: See `Decoding`.
        float_images: See `Decoding`.

    Raises:
        ValueError: A value is out of range, or `mean` or `std` does not fit the channels.
    """

    channels: int = 3
    size: tuple[int, int] = (224, 224)
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = DEFAULT_CROP_PCT
    crop_mode: str = DEFAULT_CROP_MODE
    background: tuple[int, int, int] = (255, 255, 255)
    value_range: tuple[float, float] | None = None
    float_images: bool = False

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels: expected at least 1, got {self.channels}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size: expected height and width of at least 1, got {self.size}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) == 1:
                object.__setattr__(self, name, values * self.channels)
            elif len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values for {self.channels} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} is not above 0")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(
                f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}"
            )
        if self.crop_mode not in CROP_MODES:
            raise ValueError(f"crop_mode: expected one of {', '.join(CROP_MODES)}, got {self.crop_mode!r}")
        if not 0 < self.crop_pct <= 2:
            raise ValueError(f"crop_pct: expected more than 0 and at most 2, got {self.crop_pct}")
        if len(self.background) != 3 or not all(0 <= value <= 255 for value in self.background):
            raise ValueError(f"background: expected three values from 0 to 255, got {self.background}")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range {self.value_range}: the first is not below the second")
        if self.decoding.to_tensor and self.crop_mode == "border":
            raise ValueError(
                "crop_mode 'border' is for 8-bit images of 1 or 3 channels; use 'center' or 'squash'"
            )

    @classmethod
    def of_model(cls, model_or_cfg: Any, **changes: Any) -> "Preprocessing":
        """The preprocessing of a model's pretrained configuration, as `timm.data.resolve_model_data_config`.

        If the model has other channels than its configuration, one channel gets the average of mean and std,
        and more channels repeat them in turn, just as timm converts the weights of the first convolution.

        Args:
            model_or_cfg: A model of timm's registry, or its pretrained configuration (a mapping, or timm's
                object).
            changes: Fields that differ from the model's; those that are None are left to the model.
        """
        cfg = _configuration(model_or_cfg)
        _, height, width = cfg.get("input_size") or (3, 224, 224)
        mean = tuple(cfg.get("mean") or IMAGENET_DEFAULT_MEAN)
        std = tuple(cfg.get("std") or IMAGENET_DEFAULT_STD)
        changes = {name: value for name, value in changes.items() if value is not None}
        channels = changes.get("channels") or _input_channels(model_or_cfg, cfg)
        values: dict[str, Any] = {
            "channels": channels,
            "size": (height, width),
            "mean": _for_channels(mean, channels),
            "std": _for_channels(std, channels),
            "interpolation": cfg.get("interpolation") or "bicubic",
            "crop_pct": cfg.get("crop_pct") or DEFAULT_CROP_PCT,
            "crop_mode": cfg.get("crop_mode") or DEFAULT_CROP_MODE,
        }
        return cls(**{**values, **changes})

    @property
    def decoding(self) -> Decoding:
        """How images are decoded for it."""
        return Decoding(self.channels, self.background, self.value_range, self.float_images)

    def read(self, file: str | Path | BinaryIO, name: str | None = None) -> DecodedImage:
        """Decode a file for `transform`; see `read_image`."""
        return read_image(file, self.decoding, name)

    def convert(self, image: DecodedImage, name: str = "image") -> DecodedImage:
        """An image that is open already, for `transform`; see `Decoding.convert`."""
        return self.decoding.convert(image, name)

    def transform(self) -> Callable[[DecodedImage], Tensor]:
        """From a decoded image to a normed tensor (channels, height, width): timm's evaluation transform."""
        return create_transform(**self.to_pretrained_cfg())

    def timm_arguments(self) -> dict[str, Any]:
        """The keyword arguments that timm's evaluation and training transforms share."""
        return {
            "input_size": (self.channels, *self.size),
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON or a checkpoint."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field is unknown or out of range.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"preprocessing: unknown {', '.join(sorted(unknown))}")
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)

    def to_pretrained_cfg(self) -> dict[str, Any]:
        """The settings as timm's pretrained configurations and its evaluation transform name them."""
        return {**self.timm_arguments(), "crop_pct": self.crop_pct, "crop_mode": self.crop_mode}


def _configuration(model_or_cfg: Any) -> Mapping[str, Any]:
    cfg = model_or_cfg
    if isinstance(cfg, nn.Module):
        cfg = getattr(cfg, "pretrained_cfg", None) or getattr(cfg, "default_cfg", None)
    if cfg is None:
        return {}
    if isinstance(cfg, Mapping):
        return cfg
    if hasattr(cfg, "to_dict"):  # timm's PretrainedCfg
        values: Mapping[str, Any] = cfg.to_dict()
        return values
    raise TypeError(f"expected a model or a pretrained configuration, got {type(cfg).__name__}")


def _input_channels(model_or_cfg: Any, cfg: Mapping[str, Any]) -> int:
    """Input channels of a model's first convolution, or else those in its pretrained configuration."""
    names = cfg.get("first_conv")
    if isinstance(model_or_cfg, nn.Module) and names:
        modules = dict(model_or_cfg.named_modules())
        first_conv = modules.get(names if isinstance(names, str) else names[0])
        weight = getattr(first_conv, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 4:
            return weight.shape[1]
    return int((cfg.get("input_size") or (3,))[0])


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Mean or std for another number of channels: the average for one, repeated in turn for more."""
    if len(values) == channels:
        return values
    if channels == 1:
        return (sum(values) / len(values),)
    return (values * math.ceil(channels / len(values)))[:channels]
