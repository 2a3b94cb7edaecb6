"""The layers of VMamba, channels last."""

from vmamba.nn.block import VSSBlock
from vmamba.nn.config import SS2DConfig
from vmamba.nn.embed import ConvDownsample, ConvStem, MergeDownsample, PatchStem
from vmamba.nn.fused import forms  # noqa: F401  (the fused forms register themselves)
from vmamba.nn.mlp import Mlp
from vmamba.nn.ss2d import SS2D, CascadeSS2D

# Last: importing the package `vmamba.nn.fused` sets this very name to the package.
from vmamba.nn.fused.switch import fused  # isort: skip

__all__ = [
    "SS2D",
    "CascadeSS2D",
    "ConvDownsample",
    "ConvStem",
    "MergeDownsample",
    "Mlp",
    "PatchStem",
    "SS2DConfig",
    "VSSBlock",
    "fused",
]
