"""ADE20K as it is downloaded for the scene parsing benchmark: 150 classes."""

from typing import Literal

from vmamba.data.decoding import RGB, Decoding
from vmamba.data.section import SegmentationSection, Split
from vmamba.data.segmented import SegmentedImages


class Ade20kSection(SegmentationSection):
    """The folder ADEChallengeData2016."""

    source: Literal["ade20k"] = "ade20k"
    train_split: str = "training"
    val_split: str = "validation"

    def open(self, split: Split, decoding: Decoding = RGB) -> SegmentedImages:
        raise NotImplementedError
