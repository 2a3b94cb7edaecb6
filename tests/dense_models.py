"""Small detectors and segmenters, and files of their weights as mmdet and mmseg write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vmamba.heads import Features, MaskRCNN, UPerNet, mask_rcnn, upernet

BACKBONE: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}


def spread(model: nn.Module) -> Any:
    """Weights at which outputs differ between places and classes."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval()


def detector(backbone: str = "vmamba_tiny", num_classes: int = 4, **settings: Any) -> MaskRCNN:
    args = BACKBONE if backbone == "vmamba_tiny" else {}
    defaults = {"channels": 8, "hidden": 16, "min_size": 64, "max_size": 128, "detections": 12}
    model = spread(mask_rcnn(Features.create(backbone, **args), num_classes, **{**defaults, **settings}))
    for layer, rows in (
        (model.roi_heads.box_predictor.bbox_pred, 4),
        (model.roi_heads.mask_predictor.mask_fcn_logits, 1),
    ):
        for values in (layer.weight, layer.bias):
            values.data[:rows] = 0  # the background's, which mmdet does not have
    return model


def segmenter(num_classes: int = 5, backbone: str = "vmamba_tiny", **args: Any) -> UPerNet:
    args = {**(BACKBONE if backbone == "vmamba_tiny" else {}), **args}
    model: UPerNet = spread(upernet(backbone, num_classes, channels=16, aux_channels=8, **args))
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    classifier: Any = model.decode_head.conv_seg
    with torch.no_grad():  # no class is everywhere the likeliest
        classifier.bias -= model(noise).mean((0, 2, 3))
    return model


def mmdet_file(path: Path, model: nn.Module, names: Callable[[Any], dict[str, Any]]) -> Path:
    """As mmengine saves it."""
    torch.save({"meta": {"epoch": 12}, "state_dict": names(model.state_dict())}, path)
    return path
