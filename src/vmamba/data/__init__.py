"""Data sets, their order and their randomness."""

from vmamba.data.classification import (
    ClassificationDataset,
    ImageFolder,
    ImageSource,
    MnistSubset,
    read_image,
)
from vmamba.data.loading import Loaded, ResumableLoader
from vmamba.data.sampling import EpochSampler, SampleKey
from vmamba.data.seeding import draw_seed, seeded
from vmamba.data.tar import TarImages

__all__ = [
    "ClassificationDataset",
    "EpochSampler",
    "ImageFolder",
    "ImageSource",
    "Loaded",
    "MnistSubset",
    "ResumableLoader",
    "SampleKey",
    "TarImages",
    "draw_seed",
    "read_image",
    "seeded",
]
