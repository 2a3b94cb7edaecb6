"""What an analysis runs: a model's backbone, made for the images' size, and images as it takes them.

c channels, h height, w width.
"""

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.analysis.complexity import count, gradient_memory
from vmamba.analysis.memory import lacking_memory
from vmamba.data.decoding import printable
from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import ModelError


def backbone(model: nn.Module, input_size: tuple[int, int, int], *, gradient: bool = False) -> nn.Module:
    """The outermost module with feature maps: a classifier itself, or a detector's or segmenter's backbone.

    Args:
        model: Of timm's registry, or with such a model in it.
        input_size: (c, h, w) of the images. A model that is made for one size is changed to take this one.
        gradient: Whether it will be differentiated by an image, which needs more memory.

    Raises:
        ModelError: There is no such module, it cannot take that size, or on a CPU there is no memory for it.
    """
    for module in model.modules():
        if hasattr(module, "forward_intermediates"):
            break
    else:
        raise ModelError(
            f"model: expected one with feature maps (forward_intermediates), {type(model).__name__} has none"
        )
    _resize(module, input_size[1:])
    if next(module.parameters()).device.type == "cpu":
        needed = gradient_memory(module, input_size) if gradient else count(module, input_size).peak_memory
        lack = lacking_memory(needed)
        if lack is not None:
            sides = "x".join(map(str, input_size[1:]))
            work = "the gradient" if gradient else "one pass"
            raise ModelError(
                f"model: {work} of {type(module).__name__} over an image of {sides} takes {lack}"
            )
    return module


def _resize(module: nn.Module, size: tuple[int, int]) -> None:
    """Make a model that is made for one size of images take another."""
    config = getattr(module, "pretrained_cfg", None) or {}
    if not config.get("fixed_input_size") or tuple(config["input_size"][1:]) == size:
        return
    resize: Any = getattr(module, "set_input_size", None)
    if resize is None:
        made_for = "x".join(map(str, config["input_size"][1:]))
        raise ModelError(f"model: {type(module).__name__} takes images of {made_for} only, not of {size}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, of how timm resamples Swin's tables of positions
            resize(img_size=size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: {type(module).__name__} does not take images of {size}: {error}") from error


def read_input(
    path: str | os.PathLike[str], preprocessing: Preprocessing, size: tuple[int, int] | None = None
) -> Tensor:
    """An image file as a model takes it, (c, h, w), resized, cropped and normed.

    Args:
        path: Of the image.
        preprocessing: Of the model.
        size: Height and width; None for those of the preprocessing.

    Raises:
        DataError: The image is missing or damaged.
    """
    if size is not None:
        preprocessing = replace(preprocessing, size=size)
    return preprocessing.transform()(preprocessing.read(Path(path), printable(os.fspath(path))))


def shown(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """A model's input as a picture, (c, h, w) in [0, 1]: the inverse of norming.

    Args:
        image: From `read_input`.
        preprocessing: The same.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (image * std + mean).clamp(0, 1)
