"""Data sets, their order and their randomness."""

from vmamba.data.classification import (
    ClassificationDataset,
    ImageFolder,
    ImageSource,
    MnistSubset,
    read_image,
)
from vmamba.data.huggingface import HuggingFaceImages
from vmamba.data.loading import Loaded, ResumableLoader, ShardError
from vmamba.data.pack import write_shards, write_tar
from vmamba.data.remote import RemoteShards
from vmamba.data.sampling import EpochSampler, Groups, SampleKey
from vmamba.data.seeding import draw_seed, seeded
from vmamba.data.shards import Shards, find_shards, read_classes
from vmamba.data.storage import is_url
from vmamba.data.tar import TarImages

__all__ = [
    "ClassificationDataset",
    "EpochSampler",
    "Groups",
    "HuggingFaceImages",
    "ImageFolder",
    "ImageSource",
    "Loaded",
    "MnistSubset",
    "RemoteShards",
    "ResumableLoader",
    "SampleKey",
    "ShardError",
    "Shards",
    "TarImages",
    "draw_seed",
    "find_shards",
    "is_url",
    "read_classes",
    "read_image",
    "seeded",
    "write_shards",
    "write_tar",
]
