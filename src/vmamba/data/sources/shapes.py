"""Built-in images of shapes, drawn from a seed."""

from typing import Literal

from vmamba.data.annotated import AnnotatedImages
from vmamba.data.decoding import RGB, Decoding
from vmamba.data.section import DetectionSection, SegmentationSection, Split
from vmamba.data.segmented import SegmentedImages


class ShapesDetectionSection(DetectionSection):
    """Built in: images of shapes, drawn from a seed."""

    source: Literal["shapes"] = "shapes"

    def open(self, split: Split, decoding: Decoding = RGB) -> AnnotatedImages:
        raise NotImplementedError


class ShapesSegmentationSection(SegmentationSection):
    """Built in: images of shapes, drawn from a seed."""

    source: Literal["shapes"] = "shapes"

    def open(self, split: Split, decoding: Decoding = RGB) -> SegmentedImages:
        raise NotImplementedError
