"""Folders of images and of masks, whose pixels are numbers of classes."""

from typing import Literal

from vmamba.data.decoding import RGB, Decoding
from vmamba.data.section import SegmentationSection, Split
from vmamba.data.segmented import SegmentedImages


class MasksSection(SegmentationSection):
    """Folders of images and of masks, `images/<split>/…` and `masks/<split>/…`."""

    source: Literal["masks"] = "masks"

    def open(self, split: Split, decoding: Decoding = RGB) -> SegmentedImages:
        raise NotImplementedError
