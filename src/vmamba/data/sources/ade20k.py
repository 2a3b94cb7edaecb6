"""ADE20K as the scene parsing benchmark has it: 150 classes."""

from pathlib import Path
from typing import Literal

from vmamba.data.decoding import RGB, Decoding
from vmamba.data.names import ADE20K_CLASSES
from vmamba.data.section import SegmentationSection, Split
from vmamba.data.sources.masks import MaskFolder, MaskValues
from vmamba.labels import IGNORED


class Ade20kSection(SegmentationSection):
    """The folder ADEChallengeData2016, with `images/<split>/*.jpg` and `annotations/<split>/*.png`."""

    source: Literal["ade20k"] = "ade20k"
    train_split: str = "training"
    val_split: str = "validation"

    def open(self, split: Split, decoding: Decoding = RGB) -> MaskFolder:
        root, name = Path(self._root()), self._split_name(split)
        # Masks have the classes as 1 to 150; 0 is everything else.
        values = MaskValues(dict(enumerate(ADE20K_CLASSES, start=1)), [0, IGNORED])
        return MaskFolder(root / "images" / name, root / "annotations" / name, values, decoding)
