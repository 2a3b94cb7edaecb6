"""Parameters and multiply-adds of a backbone in a detector or segmenter: the paper's Tables 2 and 3."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vmamba.analysis.complexity import Complexity, count
from vmamba.heads import FixedRegions, mask_rcnn, upernet


@dataclass(frozen=True)
class Head:
    """How a head is counted.

    Attributes:
        build: From a backbone's name to what is counted.
        size: Height and width of the image, as in the paper.
        summary: What is counted, in words.
    """

    build: Callable[[str], nn.Module]
    size: tuple[int, int]
    summary: str


HEADS = {
    "mask_rcnn": Head(
        lambda name: FixedRegions(mask_rcnn(name)),
        (800, 1280),
        "Mask R-CNN, 80 classes and background; 1,000 regions in the box head, 100 in the mask head",
    ),
    "upernet": Head(
        upernet,
        (512, 2048),
        "UPerNet, 150 classes; parameters with the auxiliary head, GMACs without: only training runs it",
    ),
}


def count_in_head(backbone: str, head: str, size: tuple[int, int] | None = None) -> Complexity:
    """Count one forward pass with one image, on the meta device: nothing is computed.

    Args:
        backbone: A name that `vmamba.heads.mask_rcnn` takes.
        head: One of `HEADS`.
        size: Height and width of the image, both multiples of 32; default the paper's.

    Raises:
        ModelError: There is no such model, it cannot be a backbone, or does not take that size.
    """
    with torch.device("meta"):
        model = HEADS[head].build(backbone)
    return count(model, (3, *(size or HEADS[head].size)))
