"""What an analysis runs: a model's backbone, made for the images' size, and images as it takes them.

c channels, h height, w width.
"""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.data.decoding import printable
from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import ModelError


def backbone(model: nn.Module, size: tuple[int, int] | None = None) -> nn.Module:
    """The outermost module with feature maps: a classifier itself, or a detector's or segmenter's backbone.

    Args:
        model: Of timm's registry, or with such a model in it.
        size: Height and width of the images. A model that is made for one size is changed to take this one.

    Raises:
        ModelError: There is no such module, or it cannot take that size.
    """
    for module in model.modules():
        if hasattr(module, "forward_intermediates"):
            break
    else:
        raise ModelError(
            f"model: expected one with feature maps (forward_intermediates), {type(model).__name__} has none"
        )
    config = getattr(module, "pretrained_cfg", None) or {}
    if size is None or not config.get("fixed_input_size") or tuple(config["input_size"][1:]) == tuple(size):
        return module
    resize: Any = getattr(module, "set_input_size", None)
    if resize is None:
        raise ModelError(
            f"model: {type(module).__name__} takes images of {config['input_size'][1:]}, height and width, "
            f"only, not of {size}"
        )
    try:
        resize(img_size=size)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ModelError(f"model: {type(module).__name__} does not take images of {size}: {error}") from error
    return module


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
    return preprocessing.transform()(preprocessing.read(path, printable(os.fspath(path))))


def shown(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """A model's input as a picture, (c, h, w) in [0, 1]: the inverse of norming.

    Args:
        image: From `read_input`.
        preprocessing: The same.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return (image * std + mean).clamp(0, 1)
