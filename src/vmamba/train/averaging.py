"""Test-time augmentation."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class AveragedViews(nn.Module):
    """A classifier's probabilities averaged over views of the same crop: test-time augmentation.

    Args:
        model: From images (B, C, H, W) to logits (B, classes).
        flip: Look at each view and at its mirror image.
        scales: Sides of the views over the crop's.

    Returns:
        The logarithm of the mean probability, (B, classes), in the place of logits.
    """

    def __init__(self, model: nn.Module, flip: bool = False, scales: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.model, self.flip, self.scales = model, flip, tuple(scales)

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        height, width = images.shape[-2:]
        for scale in self.scales:
            view = images
            if scale != 1:
                size = [max(1, round(side * scale)) for side in (height, width)]
                view = F.interpolate(images, size, mode="bicubic", antialias=True)
            yield view
            if self.flip:
                yield view.flip(-1)

    def forward(self, images: Tensor) -> Tensor:
        found = [self.model(view).float().softmax(-1) for view in self._views(images)]
        return torch.stack(found).mean(0).log()
