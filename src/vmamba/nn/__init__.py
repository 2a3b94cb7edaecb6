"""The layers of VMamba, channels last."""

from vmamba.nn.block import VSSBlock
from vmamba.nn.embed import ConvDownsample, ConvStem, MergeDownsample, PatchStem
from vmamba.nn.ss2d import SS2D, CascadeSS2D

__all__ = ["SS2D", "CascadeSS2D", "ConvDownsample", "ConvStem", "MergeDownsample", "PatchStem", "VSSBlock"]
