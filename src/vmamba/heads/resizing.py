"""From images and targets to a padded batch, and from the batch's frame back to the images'."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from vmamba.heads.proposals import PADDED_SIZE
from vmamba.sizes import scaled_size

DIVISOR = 32
"""Batches are padded to multiples of it."""


class Resize(GeneralizedRCNNTransform):
    """torchvision's, with mmdet's rounding of sizes, and masks padded as mmdet does.

    Args:
        min_size: The shorter side, or several, of which training draws one and evaluation takes the last.
        max_size: The longer side at most.
        mean: Of the image's channels, in 0 … 1.
        std: Their deviation.
        in_training: Also resize when training; otherwise images are expected at their final size.
    """

    def __init__(
        self,
        min_size: int | Sequence[int],
        max_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        in_training: bool,
    ) -> None:
        sizes = [min_size] if isinstance(min_size, int) else list(min_size)
        super().__init__(sizes, max_size, list(mean), list(std), size_divisible=DIVISOR)
        self.in_training = in_training

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Images of any sizes → one batch; the targets' boxes and masks move along, in copies."""
        batch, moved = super().forward(images, targets)
        height, width = batch.tensors.shape[-2:]
        for target, size in zip(moved or (), batch.image_sizes, strict=moved is not None):
            target[PADDED_SIZE] = tuple(-(-side // DIVISOR) * DIVISOR for side in size)
            target["masks"] = F.pad(target["masks"], (0, width - size[1], 0, height - size[0]))
        return batch, moved

    def resize(
        self, image: Tensor, target: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """An image (c, h, w) and its target at the model's size."""
        size = image.shape[-2], image.shape[-1]
        if self.training and not self.in_training:
            return image, target
        short = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        new = scaled_size(size, short, self.max_size)
        if new == size:
            return image, target
        image = F.interpolate(image[None], new, mode="bilinear", align_corners=False)[0]
        if target is not None:
            masks = target["masks"]
            resized = F.interpolate(masks[None].float(), new)[0].to(masks.dtype) if len(masks) else None
            target["masks"] = masks.new_zeros(0, *new) if resized is None else resized
            target["boxes"] = resize_boxes(target["boxes"], size, new)
        return image, target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: Sequence[tuple[int, int]],
        original_image_sizes: Sequence[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        """Boxes in the batch's frame → in the images' frames; nothing to do in training.

        Masks stay those of the boxes; see `vmamba.heads.masks.paste_masks`.

        Args:
            result: Boxes, labels, scores and masks (n, 1, m, m) of each image.
            image_shapes: (height, width) in the batch, without padding.
            original_image_sizes: (height, width) before.
        """
        for detections, size, original in zip(result, image_shapes, original_image_sizes, strict=False):
            detections["boxes"] = resize_boxes(detections["boxes"], size, original)
        return result
