"""A source's images through a transform."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vmamba.data.decoding import DecodedImage
from vmamba.data.sampling import SampleKey
from vmamba.data.seeding import seeded
from vmamba.data.source import ClassifiedImages, ImageSource, Target


class ImageDataset(Dataset[Any], Generic[Target]):
    """A source's samples, augmented, for `EpochSampler`.

    What `augment` draws is a function of seed and `SampleKey` alone.

    Args:
        source: Where the images come from.
        seed: Of the augmentation.

    Attributes:
        groups: Samples that should be read together.
        balance: The class of each sample, if training should see every class equally often.
    """

    balance: NDArray[np.int64] | None = None

    def __init__(self, source: ImageSource[Target], seed: int = 0) -> None:
        self.source, self.seed = source, seed
        self.groups = source.groups

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        """A sample's name for messages."""
        return self.source.name(index)

    @abstractmethod
    def augment(self, image: DecodedImage, target: Target) -> Any:
        """Turn a decoded image and its target into a sample."""

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, index, repetition = SampleKey(*key)
        image, target = self.source.load(index)
        counters = (repetition,) if repetition else ()
        with seeded("augmentation", self.seed, epoch, index, *counters):
            return self.augment(image, target)


class ClassificationDataset(ImageDataset[int]):
    """Images of one class each.

    Args:
        source: Where the images come from.
        transform: From a decoded image to a tensor (c, h, w).
        seed: Of the augmentation.
        balance: The class of each sample, if training should see every class equally often; see
            `ClassificationSection.sampling_classes`.
    """

    source: ClassifiedImages

    def __init__(
        self,
        source: ClassifiedImages,
        transform: Callable[[DecodedImage], Any],
        seed: int = 0,
        balance: NDArray[np.int64] | None = None,
    ) -> None:
        super().__init__(source, seed)
        self.transform, self.balance = transform, balance

    def augment(self, image: DecodedImage, target: int) -> tuple[Tensor, int]:
        return self.transform(image), target
