"""Sources of images, one file each: how to read it, and its keys in a recipe.

A new source of classified images is a file here, with a section that derives from `ClassificationSection`,
and a line in the import below. Sections for other tasks derive from `DataSection`, and the task calls
`union_of_sources` for them.
"""

from typing import TYPE_CHECKING, TypeAlias

from vmamba.data.section import ClassificationSection, union_of_sources
from vmamba.data.sources import (  # noqa: F401  (each registers its section)
    folder,
    huggingface,
    mnist,
    tar,
    webdataset,
)

if TYPE_CHECKING:
    ClassificationData: TypeAlias = ClassificationSection
else:
    ClassificationData = union_of_sources(ClassificationSection, default="folder")
    """The type of `data` in a recipe for classification: the section of the source that it names."""
