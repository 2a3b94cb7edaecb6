"""Heads for dense tasks on any backbone of timm's."""

from vmamba.heads.features import Features
from vmamba.heads.mask_rcnn import FixedRegions, MaskRCNN, MaskRCNNConfig, mask_rcnn
from vmamba.heads.names import mmdet_names
from vmamba.heads.upernet import UPerNet, upernet

__all__ = [
    "Features",
    "FixedRegions",
    "MaskRCNN",
    "MaskRCNNConfig",
    "UPerNet",
    "mask_rcnn",
    "mmdet_names",
    "upernet",
]
