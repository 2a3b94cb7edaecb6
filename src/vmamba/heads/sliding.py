"""Segmenting images of any size: resized for the model, by windows, averaged over scales and mirror images.

A segmenter here is any call from images (b, c, h, w) to logits (b, k, h, w), such as a `UPerNet` in
evaluation mode: called as it is, it takes each image whole.

b batch, c channels, h height, w width, k classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from vmamba.heads.upernet import resize
from vmamba.sizes import scaled_size

Segmenter = Callable[[Tensor], Tensor]


def sliding(segmenter: Segmenter, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
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


def mean_probabilities(
    segmenter: Segmenter, views: Iterable[Tensor], size: tuple[int, int], *, flip: bool = True
) -> Tensor:
    """Probabilities (b, k, *size): the mean over views of the same images, and over their mirror images.

    Args:
        segmenter: Called for each view.
        views: The images at several sizes, each (b, c, h, w).
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


class SegmentedViews(nn.Module):
    """A segmenter for images of any size: (b, c, h, w) → scores (b, k, h, w), of which the largest wins.

    Images are resized for the model, keeping their ratio, and the logits resized back, as mmseg evaluates.
    With several views the scores are the mean of their probabilities, else logits.

    Args:
        model: From images (b, c, h, w) to logits (b, k, h, w).
        short: Images are enlarged or reduced until their shorter side has this many pixels,
        long: or fewer, so that the longer side has at most this many.
        scales: Factors of both, one for each view.
        flip: Add the mirror image of each view.
        window: Side of the square windows by which a view is segmented; None for the whole view.
        stride: Steps between windows; None for two thirds of the window.

    Attributes:
        finite: Of each of the last images, whether its logits were all finite, (b,); if not, its classes mean
            nothing.

    Raises:
        ValueError: There is no scale, or one is not above 0; or the stride does not fit the window.
    """

    def __init__(
        self,
        model: nn.Module,
        short: int,
        long: int,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: int | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales: expected numbers above 0, got {list(scales)}")
        if window is None and stride is not None:
            raise ValueError("stride: there is no window that it could move")
        self.model, self.short, self.long = model, short, long
        self.scales, self.flip = tuple(scales), flip
        self.window = window
        self.finite = torch.ones(0, dtype=torch.bool)
        self.stride = stride if stride is not None or window is None else max(1, window * 2 // 3)
        if window is not None and not 0 < (self.stride or 0) <= window:
            raise ValueError(f"stride: expected from 1 to the window's {window}, got {stride}")

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        self.finite = images.new_ones(len(images), dtype=torch.bool)
        if len(self.scales) == 1 and not self.flip:
            return resize(self._segment(self._view(images, self.scales[0])), (height, width))
        views = (self._view(images, scale) for scale in self.scales)
        return mean_probabilities(self._segment, views, (height, width), flip=self.flip)

    def labels(self, images: Tensor) -> Tensor:
        """The class of each pixel, uint8 (b, h, w).

        With one view the scores of all classes at the images' size are never in memory. With several views
        their mean is, which takes 7 GB for a photo of 12 megapixels and 150 classes.
        """
        if len(self.scales) > 1 or self.flip:
            return self(images).argmax(1).byte()
        self.finite = images.new_ones(len(images), dtype=torch.bool)
        logits = self._segment(self._view(images, self.scales[0]))
        return torch.stack([best_classes(each, images.shape[2:]) for each in logits])

    def _view(self, images: Tensor, scale: float) -> Tensor:
        height, width = images.shape[2:]
        size = scaled_size((height, width), int(self.short * scale + 0.5), int(self.long * scale + 0.5))
        return images if size == (height, width) else resize(images, size)

    def _segment(self, images: Tensor) -> Tensor:
        if self.window is None or self.stride is None:
            logits: Tensor = self.model(images)
        else:
            crop, stride = (self.window, self.window), (self.stride, self.stride)
            logits = sliding(self.model, images, crop, stride)
        self.finite = self.finite & logits.isfinite().flatten(1).all(1)
        return logits


def best_classes(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The class of each pixel, uint8 (h, w), after resizing logits (k, h', w') bilinearly to a size.

    Some classes at a time, since a photo's logits of 150 classes take 7 GB.
    """
    height, width = size
    step = max(1, _BLOCK // (height * width))
    best: Tensor | None = None
    labels = torch.zeros(height, width, dtype=torch.uint8, device=logits.device)
    for start in range(0, len(logits), step):
        block = logits[start : start + step]
        resized = block if block.shape[1:] == (height, width) else resize(block[None], size)[0]
        values, indices = resized.max(0)
        if best is None:
            best, labels = values, indices.byte()
            continue
        better = values > best
        labels[better] = (indices[better] + start).byte()
        best = torch.maximum(best, values)
    return labels


_BLOCK = 2**26
"""Most values of logits at the image's size that are held at once: 256 MB."""
