"""Test-time augmentation."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.errors import RecipeError


class AveragedViews(nn.Module):
    """A classifier's probabilities averaged over views of the same crop: test-time augmentation.

    Args:
        model: From images (B, C, H, W) to logits (B, classes).
        flip: Look at each view and at its mirror image.
        scales: Sides of the views over the crop's.

    Returns:
        The logarithm of the mean probability, (B, classes), in the place of logits.

    Raises:
        RecipeError: The model does not take a view of that size.
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
        found = torch.stack([self._judged(view) for view in self._views(images)])
        return found.logsumexp(0) - math.log(len(found))

    def _judged(self, view: Tensor) -> Tensor:
        try:
            return self.model(view).float().log_softmax(-1)
        except (AssertionError, ValueError, RuntimeError) as error:  # models refuse a size with any of these
            size = "×".join(map(str, view.shape[-2:]))
            raise RecipeError(f"scales: the model does not take a view of {size}: {error}") from error
