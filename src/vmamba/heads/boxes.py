"""Anchors, the coding of boxes, and the matching of boxes with objects, computed as mmdet computes them.

n boxes, g objects. Boxes are (x1, y1, x2, y2) in pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

STRIDES = (4, 8, 16, 32, 64)
"""Pixels of the image between neighbouring positions of each pyramid level."""


class PyramidAnchors(AnchorGenerator):
    """Three anchors at each position of five levels: 8 strides wide on average, height : width ½, 1 and 2.

    torchvision rounds their sides to whole pixels, and guesses a level's stride from its size, so that the
    last level's is 61 instead of 64 in an image 800 pixels high.
    """

    def __init__(self) -> None:
        super().__init__(tuple((8 * stride,) for stride in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES))

    def generate_anchors(
        self,
        scales: Sequence[int],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        """The anchors of one position, around (0, 0)."""
        ratios = torch.tensor(aspect_ratios, dtype=dtype, device=device or "cpu").sqrt()
        sides = torch.tensor(scales, dtype=dtype, device=device or "cpu")
        widths = (1 / ratios[:, None] * sides).flatten()
        heights = (ratios[:, None] * sides).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors of all levels, (n, 4) in float32, for each image; all images have the same."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        sizes = [feature.shape[-2:] for feature in feature_maps]
        anchors = torch.cat(self.grid_anchors(sizes, [(stride, stride) for stride in STRIDES]))
        return [anchors] * len(image_list.image_sizes)


class BoxCoder:
    """Boxes as differences from reference boxes: of centres over sides, and of the sides' logarithms.

    As torchvision's, but sides change by a factor of at most 1000/16 in both directions; torchvision leaves
    shrinking unlimited.

    Args:
        weights: Factors of the four differences.
    """

    LIMIT = math.log(1000 / 16)

    def __init__(self, weights: tuple[float, float, float, float]) -> None:
        self.weights = weights

    def encode(self, reference_boxes: Sequence[Tensor], proposals: Sequence[Tensor]) -> list[Tensor]:
        """The differences that turn each image's proposals into its reference boxes; all (n, 4)."""
        return [self._encode(*pair) for pair in zip(reference_boxes, proposals, strict=True)]

    def _encode(self, boxes: Tensor, proposals: Tensor) -> Tensor:
        (centres, sides), (targets, target_sides) = _centres(proposals.float()), _centres(boxes.float())
        moves, scales = (targets - centres) / sides, (target_sides / sides).log()
        return torch.cat([moves, scales], dim=1) * moves.new_tensor(self.weights)

    def decode(self, rel_codes: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """Boxes (n, c, 4) in float32 from differences (n, 4·c), and one list of n boxes for all images."""
        centres, sides = (each[:, None] for each in _centres(torch.cat(list(boxes)).float()))
        codes = rel_codes.float().reshape(len(centres), rel_codes[0].numel() // 4 if len(centres) else 1, 4)
        codes = codes / codes.new_tensor(self.weights)
        centres = centres + codes[..., :2] * sides
        half = codes[..., 2:].clamp(-self.LIMIT, self.LIMIT).exp() * sides / 2
        return torch.cat([centres - half, centres + half], dim=-1)


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sides of boxes, each (n, 2)."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


class Matcher:
    """Gives each box the object that it overlaps most, and each object the boxes that overlap it most.

    Args:
        high: A box of at least this IoU belongs to its object.
        low: A box of a smaller IoU with all objects is background; those between are ignored.
        best: An object's best boxes belong to it if their IoU is at least this, even if they overlap another
            object more. torchvision knows no such limit, and leaves such a box to the other object.
    """

    BELOW_LOW_THRESHOLD = -1
    BETWEEN_THRESHOLDS = -2

    def __init__(self, high: float, low: float, best: float) -> None:
        self.high, self.low, self.best = high, low, best

    def __call__(self, overlaps: Tensor) -> Tensor:
        """The object of each box, or one of the two negative constants; IoU (g, n) with g > 0 → (n,)."""
        values, matches = overlaps.max(dim=0)
        matches[values < self.high] = self.BETWEEN_THRESHOLDS
        matches[values < self.low] = self.BELOW_LOW_THRESHOLD
        if overlaps.shape[1]:
            for index, row in enumerate(overlaps):  # a later object takes a box from an earlier one
                highest = row.max()
                matches.masked_fill_((row == highest) & (highest >= self.best), index)
        return matches
