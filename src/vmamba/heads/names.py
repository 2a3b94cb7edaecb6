"""The names of mmdet's Mask R-CNN weights and ours, in both directions.

mmdet puts the background last among the classes and gives it no box and no mask; torchvision puts it first
and gives it both, which nothing reads.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vmamba.heads.features import backbone_names

_NAMES = (
    ("backbone.", "backbone.body."),
    ("neck.lateral_convs.{}.conv.", "backbone.fpn.inner_blocks.{}.0."),
    ("neck.fpn_convs.{}.conv.", "backbone.fpn.layer_blocks.{}.0."),
    ("rpn_head.rpn_conv.", "rpn.head.conv.0.0."),
    ("rpn_head.rpn_cls.", "rpn.head.cls_logits."),
    ("rpn_head.rpn_reg.", "rpn.head.bbox_pred."),
    ("roi_head.bbox_head.shared_fcs.0.", "roi_heads.box_head.fc6."),
    ("roi_head.bbox_head.shared_fcs.1.", "roi_heads.box_head.fc7."),
    ("roi_head.bbox_head.fc_cls.", "roi_heads.box_predictor.cls_score."),
    ("roi_head.bbox_head.fc_reg.", "roi_heads.box_predictor.bbox_pred."),
    ("roi_head.mask_head.convs.{}.conv.", "roi_heads.mask_head.{}.0."),
    ("roi_head.mask_head.upsample.", "roi_heads.mask_predictor.conv5_mask."),
    ("roi_head.mask_head.conv_logits.", "roi_heads.mask_predictor.mask_fcn_logits."),
)
"""Beginnings of names in mmdet and here; {} stands for a number."""

_SCORES = "roi_heads.box_predictor.cls_score."
_ROWS_OF_BACKGROUND = {
    "roi_heads.box_predictor.bbox_pred.": 4,
    "roi_heads.mask_predictor.mask_fcn_logits.": 1,
}
"""Layers that here have rows for the background, and how many."""


def from_mmdet(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of mmdet's Mask R-CNN → under our names; weights that already have them pass as they are.

    Args:
        state_dict: With or without `backbone.*`; names of no part of the detector pass as they are.
    """
    if not any(name.startswith(("neck.", "rpn_head.", "roi_head.")) for name in state_dict):
        return dict(state_dict)
    converted = {}
    for theirs, weight in state_dict.items():
        name = _renamed(theirs, _NAMES)
        if isinstance(weight, Tensor) and weight.ndim:
            if name.startswith(_SCORES):
                weight = weight.roll(1, dims=0)
            elif rows := _background(name):
                weight = torch.cat([weight.new_zeros(rows, *weight.shape[1:]), weight])
        converted[name] = weight
    return converted


def mmdet_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a `MaskRCNN` under mmdet's names; those of a VMamba get its authors' names and shapes.

    With `torch.save({"state_dict": mmdet_names(model.state_dict())}, file)` their code reads them, and
    `vmamba.load_weights` reads them back without loss. The rows of the background's box and mask are left
    out: they are 0 from the beginning on, and nothing reads them.
    """
    swapped = tuple((ours, theirs) for theirs, ours in _NAMES)
    heads: dict[str, Any] = {}
    body: dict[str, Any] = {}
    for name, weight in state_dict.items():
        if isinstance(weight, Tensor) and weight.ndim:
            if name.startswith(_SCORES):
                weight = weight.roll(-1, dims=0)
            elif rows := _background(name):
                weight = weight[rows:].clone()
        theirs = _renamed(name, swapped)
        inside = theirs.startswith("backbone.")
        (body if inside else heads)[theirs.removeprefix("backbone.") if inside else theirs] = weight
    return {**{f"backbone.{name}": weight for name, weight in backbone_names(body).items()}, **heads}


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        if match := re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name):
            return new.format(*match.groups()) + name[match.end() :]
    return name


def _background(name: str) -> int:
    """The rows that a layer has here for the background."""
    return next((rows for layer, rows in _ROWS_OF_BACKGROUND.items() if name.startswith(layer)), 0)
