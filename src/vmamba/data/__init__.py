"""Datasets, their order and their randomness."""

from vmamba.data.annotated import AnnotatedImages
from vmamba.data.classes import read_classes
from vmamba.data.dataset import ClassificationDataset, ImageDataset
from vmamba.data.decoding import DecodedImage, Decoding, image_suffixes, printable, read_image
from vmamba.data.dense import (
    DetectionAugment,
    DetectionDataset,
    SegmentationAugment,
    SegmentationDataset,
    collate_dense,
)
from vmamba.data.finding import LeftOut, find_images
from vmamba.data.loading import LoadedBatch, ResumableLoader, ShardError
from vmamba.data.objects import Objects
from vmamba.data.pack import write_shards, write_tar
from vmamba.data.preprocessing import Preprocessing
from vmamba.data.sampling import BalancedSampler, EpochSampler, SampleGroups, SampleKey, sampler_for
from vmamba.data.section import ClassificationSection, DataSection, DetectionSection, SegmentationSection
from vmamba.data.seeding import draw_seed, seeded
from vmamba.data.segmented import SegmentedImages
from vmamba.data.source import ClassifiedImages, ImageSource, class_weights
from vmamba.data.sources import ClassificationData, DetectionData, SegmentationData
from vmamba.data.sources.folder import FolderSection, ImageFolder
from vmamba.data.sources.huggingface import HuggingFaceImages
from vmamba.data.sources.mnist import MnistSubset
from vmamba.data.sources.remote import RemoteShards
from vmamba.data.sources.tar import TarImages
from vmamba.data.sources.webdataset import Shards, find_shards
from vmamba.data.splitting import SplitImages
from vmamba.data.storage import is_url

__all__ = [
    "AnnotatedImages",
    "BalancedSampler",
    "ClassificationData",
    "ClassificationDataset",
    "ClassificationSection",
    "ClassifiedImages",
    "DataSection",
    "DecodedImage",
    "Decoding",
    "DetectionAugment",
    "DetectionData",
    "DetectionDataset",
    "DetectionSection",
    "EpochSampler",
    "FolderSection",
    "HuggingFaceImages",
    "ImageDataset",
    "ImageFolder",
    "ImageSource",
    "LeftOut",
    "LoadedBatch",
    "MnistSubset",
    "Objects",
    "Preprocessing",
    "RemoteShards",
    "ResumableLoader",
    "SampleGroups",
    "SampleKey",
    "SegmentationAugment",
    "SegmentationData",
    "SegmentationDataset",
    "SegmentationSection",
    "SegmentedImages",
    "ShardError",
    "Shards",
    "SplitImages",
    "TarImages",
    "class_weights",
    "collate_dense",
    "draw_seed",
    "find_images",
    "find_shards",
    "image_suffixes",
    "is_url",
    "printable",
    "read_classes",
    "read_image",
    "sampler_for",
    "seeded",
    "write_shards",
    "write_tar",
]
