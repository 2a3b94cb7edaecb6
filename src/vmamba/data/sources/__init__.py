"""Sources of images, one file each: how it is read, and its keys of a recipe.

A new source of images with a class each is a file here, with a section that derives from
`ClassificationSection`, and its line in the import below. Sources for other tasks derive from `DataSection`,
and their task makes a union of its own.
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
