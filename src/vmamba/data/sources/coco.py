"""A file of annotations in COCO's instance format, and a folder of images."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from vmamba.data.annotated import AnnotatedImages
from vmamba.data.decoding import RGB, Decoding
from vmamba.data.section import DetectionSection, Split


class CocoImages(AnnotatedImages):
    """Images and the objects that a file in COCO's instance format says of them."""

    def __init__(self, folder: str | Path, annotations: str | Path, decoding: Decoding = RGB) -> None:
        raise NotImplementedError


class CocoSection(DetectionSection):
    """Folders of images, and for each a file of annotations in COCO's instance format."""

    source: Literal["coco"] = "coco"
    train_split: str = "train2017"
    val_split: str = "val2017"
    train_annotations: str = Field(
        default="annotations/instances_train2017.json", description="a path, or a path below root"
    )
    val_annotations: str = Field(
        default="annotations/instances_val2017.json", description="a path, or a path below root"
    )

    def open(self, split: Split, decoding: Decoding = RGB) -> CocoImages:
        raise NotImplementedError
