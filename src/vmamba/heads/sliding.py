"""Segmenting larger images by windows, and averaging over scales and mirror images.

A segmenter here is any call from images (b, c, h, w) to logits (b, k, h, w), such as a `UPerNet` in
evaluation mode: called as it is, it takes each image whole. b batch, c channels, h height, w width, k classes.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from vmamba.heads.upernet import resize

Segmenter = Callable[[Tensor], Tensor]


def sliding(
    segmenter: Segmenter, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]
) -> Tensor:
    """Logits (b, k, h, w), averaged where windows overlap.

    The last window of a row or column ends at the image's border. Where one window covers the image, the
    result is that of the whole image.

    Args:
        segmenter: Called once for each window.
        images: (b, c, h, w).
        crop: Height and width of a window; less where the image is smaller.
        stride: Steps from window to window, down and across.

    Raises:
        ValueError: A stride is larger than the window, so that pixels would be left out, or not positive.
    """
    if any(not 0 < step <= side for step, side in zip(stride, crop, strict=True)):
        raise ValueError(f"stride: expected from 1 to the window's {crop}, got {stride}")
    height, width = images.shape[2:]
    total: Tensor | None = None
    number = images.new_zeros(height, width, dtype=torch.float32)
    for top, bottom in _windows(height, crop[0], stride[0]):
        for left, right in _windows(width, crop[1], stride[1]):
            logits = segmenter(images[:, :, top:bottom, left:right])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, top:bottom, left:right] += logits
            number[top:bottom, left:right] += 1
    assert total is not None
    return total / number.to(total.dtype)


def _windows(length: int, crop: int, stride: int) -> Iterator[tuple[int, int]]:
    """Beginning and end of each window along a side."""
    for start in range(0, max(length - crop, 0) + stride, stride):
        end = min(start + crop, length)
        yield max(end - crop, 0), end


def scaled(images: Tensor, scales: Iterable[float]) -> Iterator[Tensor]:
    """The images, bilinearly resized by each factor; sides are rounded as in mmseg."""
    height, width = images.shape[2:]
    for scale in scales:
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        yield images if size == (height, width) else resize(images, size)


def mean_probabilities(
    segmenter: Segmenter, views: Iterable[Tensor], size: tuple[int, int], *, flip: bool = True
) -> Tensor:
    """Probabilities (b, k, *size): the mean over views of the same images, and over their mirror images.

    Args:
        segmenter: Called for each view.
        views: The images at several sizes, such as `scaled` gives, each (b, c, h, w).
        size: Height and width of the result; logits are resized to it before they become probabilities.
        flip: Segment each view mirrored left to right as well.

    Raises:
        ValueError: There is no view.
    """
    total, number = None, 0
    for view in views:
        for mirrored in (False, True) if flip else (False,):
            logits = segmenter(view.flip(-1)).flip(-1) if mirrored else segmenter(view)
            probabilities = (logits if logits.shape[2:] == size else resize(logits, size)).softmax(1)
            total = probabilities if total is None else total + probabilities
            number += 1
    if total is None:
        raise ValueError("views: expected at least one")
    return total / number
