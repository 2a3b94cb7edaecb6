"""Detectors and segmenters from files that hold only weights, such as the VMamba authors'.

The sizes of the heads are read from the weights.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vmamba.errors import CheckpointError, ModelError
from vmamba.heads.features import Features
from vmamba.heads.mask_rcnn import MaskRCNN, mask_rcnn
from vmamba.heads.names import from_mmdet
from vmamba.heads.upernet import UPerNet, upernet
from vmamba.models import model_names
from vmamba.models.checkpoints import Checkpoint, Weights
from vmamba.models.factory import create_on_meta
from vmamba.models.weights import fits, load_weights


def restore(
    checkpoint: Checkpoint, name: str | None, weights: Weights, *, trained: bool = True
) -> MaskRCNN | UPerNet:
    """The model that a file's weights are of, with these weights.

    Args:
        checkpoint: With names of mmdet, mmseg or ours.
        name: Of the backbone, as timm has it; None to find the variant of VMamba by names and shapes.
        weights: Which of the checkpoint's weights to load.
        trained: False leaves the weights as the architecture draws them.

    Raises:
        CheckpointError: The weights are of another architecture, or do not fit.
        ModelError: The backbone's name is unknown or must be given.
    """
    state_dict = {key.removeprefix("module."): value for key, value in checkpoint.state_dict(weights).items()}
    detector = any(key.startswith(("roi_head.", "roi_heads.")) for key in state_dict)
    named = from_mmdet(state_dict) if detector else state_dict
    prefix = "backbone.body." if detector else "backbone."
    body = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
    norm = any(key.startswith("outnorm") for key in body)
    if name is None:
        name = _guess(checkpoint.path, body, norm)
    build = _mask_rcnn if detector else _upernet
    try:
        model = build(Features.create(name, norm=norm), named)
    except KeyError as error:
        family = "mmdet's Mask R-CNN" if detector else "mmseg's UPerNet"
        raise CheckpointError(
            f"{checkpoint.path}: not the weights of {family}, there is no {error.args[0]}"
        ) from error
    if trained:
        load_weights(model, checkpoint, weights=weights)
    return model


def _guess(path: str, body: Mapping[str, Any], norm: bool) -> str:
    """The variant of VMamba whose names and shapes are those of a file's backbone."""
    matches = [
        each
        for each in sorted(model_names(), key=len)
        if (backbone := _on_meta(each, norm)) is not None and fits(backbone, body)
    ]
    if not matches:
        raise ModelError(
            f"{path}: does not say which backbone it has, and it is none of the variants of VMamba; name it, "
            "with model=…"
        )
    return matches[0]  # a model and its aliases are the same


def _on_meta(name: str, norm: bool) -> Features | None:
    """The features of a model without memory for its weights; None if it has no maps at strides 4 to 32."""
    try:
        return Features(create_on_meta(name, num_classes=0), norm=norm)
    except ModelError:
        return None


def _mask_rcnn(backbone: Features, named: Mapping[str, Any]) -> MaskRCNN:
    return mask_rcnn(
        backbone,
        _rows(named, "roi_heads.box_predictor.cls_score.weight"),
        channels=_rows(named, "backbone.fpn.layer_blocks.0.0.weight"),
        hidden=_rows(named, "roi_heads.box_head.fc6.weight"),
    )


def _upernet(backbone: Features, named: Mapping[str, Any]) -> UPerNet:
    return upernet(
        backbone,
        _rows(named, "decode_head.conv_seg.weight"),
        channels=_rows(named, "decode_head.fpn_bottleneck.conv.weight"),
        aux_channels=_rows(named, "auxiliary_head.convs.0.conv.weight"),
    )


def _rows(weights: Mapping[str, Any], name: str) -> int:
    weight = weights[name]
    if not isinstance(weight, Tensor) or not weight.ndim:
        raise KeyError(name)
    return len(weight)
