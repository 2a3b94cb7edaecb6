"""The parameters of backbones with heads that are free of weight decay, against lists written by hand."""

import pytest
from torch import nn

from vmamba import VMamba
from vmamba.errors import RecipeError
from vmamba.heads import Features, mask_rcnn, upernet
from vmamba.train.dense import dense_parameter_groups
from vmamba.train.recipe import OptimRecipe

BLOCKS = [f"stages.{stage}.blocks.0" for stage in range(4)]
NORMS_OF_BLOCKS = [
    f"{block}.{name}"
    for block in BLOCKS
    for name in (
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "op.out_norm.weight",
        "op.out_norm.bias",
    )
]
OUTNORMS = [f"outnorm{level}.{name}" for level in range(4) for name in ("weight", "bias")]
OTHER_NORMS = [
    f"{norm}.{name}"
    for norm in ("stem.norm1", "stem.norm2", *(f"stages.{stage}.downsample.norm" for stage in (1, 2, 3)))
    for name in ("weight", "bias")
]
BIASES = [
    "stem.conv1.bias",
    "stem.conv2.bias",
    *(f"stages.{stage}.downsample.conv.bias" for stage in (1, 2, 3)),
    *(f"{block}.mlp.{layer}.bias" for block in BLOCKS for layer in ("fc1", "fc2")),
]
SCAN = [f"{block}.op.{name}" for block in BLOCKS for name in ("A_log", "D", "dt_bias")]

UPERNET_MODULES = [
    *(f"decode_head.psp_modules.{index}.1" for index in range(4)),
    "decode_head.bottleneck",
    *(f"decode_head.lateral_convs.{index}" for index in range(3)),
    *(f"decode_head.fpn_convs.{index}" for index in range(3)),
    "decode_head.fpn_bottleneck",
    "auxiliary_head.convs.0",
]
UPERNET_FREE = [f"{module}.bn.{name}" for module in UPERNET_MODULES for name in ("weight", "bias")]
UPERNET_FREE += ["decode_head.conv_seg.bias", "auxiliary_head.conv_seg.bias"]

MASK_RCNN_BIASES = [
    *(f"backbone.fpn.{kind}_blocks.{level}.0.bias" for kind in ("inner", "layer") for level in range(4)),
    *(f"rpn.head.{layer}.bias" for layer in ("conv.0.0", "cls_logits", "bbox_pred")),
    *(f"roi_heads.box_head.{layer}.bias" for layer in ("fc6", "fc7")),
    *(f"roi_heads.box_predictor.{layer}.bias" for layer in ("cls_score", "bbox_pred")),
    *(f"roi_heads.mask_head.{index}.0.bias" for index in range(4)),
    *(f"roi_heads.mask_predictor.{layer}.bias" for layer in ("conv5_mask", "mask_fcn_logits")),
]


def backbone() -> Features:
    return Features(VMamba(num_classes=0, depths=(1, 1, 1, 1), dims=(8, 16, 32, 64)))


def inside(prefix: str, names: list[str]) -> list[str]:
    """Names in a `Features` at a place of a model."""
    return [f"{prefix}.{name}" if name.startswith("outnorm") else f"{prefix}.model.{name}" for name in names]


def free(model: nn.Module, decay: str) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = dense_parameter_groups(model, OptimRecipe.model_validate({"decay": decay}))
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    return sorted(names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"])


def test_the_papers_groups_of_a_segmenter() -> None:
    """Biases, the scan's parameters, and the norms of stem, downsampling and head are decayed."""
    model = upernet(backbone(), 3, channels=8, aux_channels=8)
    assert free(model, "paper") == sorted(inside("backbone", NORMS_OF_BLOCKS + OUTNORMS))


def test_the_papers_groups_of_a_detector() -> None:
    model = mask_rcnn(backbone(), 3, channels=8, hidden=8)
    assert free(model, "paper") == sorted(inside("backbone.body", NORMS_OF_BLOCKS + OUTNORMS))


CLEAN = NORMS_OF_BLOCKS + OUTNORMS + OTHER_NORMS + BIASES + SCAN


def test_clean_groups_of_a_segmenter() -> None:
    model = upernet(backbone(), 3, channels=8, aux_channels=8)
    assert free(model, "clean") == sorted(inside("backbone", CLEAN) + UPERNET_FREE)


def test_clean_groups_of_a_detector() -> None:
    model = mask_rcnn(backbone(), 3, channels=8, hidden=8)
    assert free(model, "clean") == sorted(inside("backbone.body", CLEAN) + MASK_RCNN_BIASES)


def test_the_papers_groups_know_no_rates_by_layer() -> None:
    optim = OptimRecipe.model_validate({"decay": "paper", "layer_decay": 0.9})
    with pytest.raises(RecipeError, match="layer_decay: not with"):
        dense_parameter_groups(mask_rcnn(backbone(), 3, channels=8, hidden=8), optim)


def test_frozen_parameters_are_in_no_group() -> None:
    model = upernet(backbone(), 3, channels=8, aux_channels=8)
    model.backbone.model.requires_grad_(False)
    groups = dense_parameter_groups(model, OptimRecipe.model_validate({"decay": "paper"}))
    assert len(groups[0]["params"]) == len(OUTNORMS)
