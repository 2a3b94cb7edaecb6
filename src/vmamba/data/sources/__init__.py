"""Sources of images, one file each: how to read it, and its keys in a recipe.

A new source is a file here, with a section that derives from `ClassificationSection`, `DetectionSection` or
`SegmentationSection`, and a line in the import below. Sections for other tasks derive from `DataSection`, and
the task calls `union_of_sources` for them.
"""

from typing import TYPE_CHECKING, TypeAlias

from vmamba.data.section import (
    ClassificationSection,
    DetectionSection,
    SegmentationSection,
    union_of_sources,
)
from vmamba.data.sources import (  # noqa: F401  (each registers its section)
    ade20k,
    coco,
    folder,
    huggingface,
    masks,
    mnist,
    shapes,
    tar,
    webdataset,
)

if TYPE_CHECKING:
    ClassificationData: TypeAlias = ClassificationSection
    DetectionData: TypeAlias = DetectionSection
    SegmentationData: TypeAlias = SegmentationSection
else:
    ClassificationData = union_of_sources(ClassificationSection, default="folder")
    """The type of `data` in a recipe for classification: the section of the source that it names."""
    DetectionData = union_of_sources(DetectionSection, default="coco")
    """The same for detection."""
    SegmentationData = union_of_sources(SegmentationSection, default="masks")
    """The same for segmentation."""
