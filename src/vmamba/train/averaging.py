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
        model: From images (b, c, h, w) to logits (b, classes).
        flip: Use each view and its mirror image.
        scales: Sizes of the views relative to the crop's.

    Returns:
        The logarithm of the mean probability, (b, classes), in place of logits.

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
        log_probs = torch.stack([self._log_probs(view) for view in self._views(images)])
        return log_probs.logsumexp(0) - math.log(len(log_probs))

    def _log_probs(self, view: Tensor) -> Tensor:
        try:
            return self.model(view).float().log_softmax(-1)
        except (AssertionError, ValueError, RuntimeError) as error:  # by which models refuse a size
            size = "×".join(map(str, view.shape[-2:]))
            raise RecipeError(f"scales: the model does not take a view of {size}: {error}") from error
