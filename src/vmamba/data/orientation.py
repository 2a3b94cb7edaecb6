"""Turn targets along with the images that EXIF turns upright.

Letters in shapes: n objects, h height, w width.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vmamba.errors import DataError

_STEPS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
"""How EXIF's orientations are made upright: swap the sides, then mirror left and right, then up and down."""


def swaps_sides(orientation: int) -> bool:
    """Whether an image's height becomes its width when EXIF's orientation is made upright."""
    return _STEPS[orientation][0]


def turn_of_target(orientation: int, upright: tuple[int, int], annotated: tuple[int, int], name: str) -> int:
    """The orientation by which a target is to be turned: that of its image, or 1 if it is upright already.

    A target of the size of the stored pixels is taken to be in their frame.

    Args:
        orientation: EXIF's, of the image.
        upright: Height and width of the upright image.
        annotated: Those of the target.
        name: The image's name, for the message.

    Raises:
        DataError: The target's size is neither that of the stored nor of the upright image.
    """
    stored = upright[::-1] if swaps_sides(orientation) else upright
    if annotated == stored:
        return orientation
    if annotated == upright:
        return 1
    turned = f" ({upright[1]}×{upright[0]} when turned upright)" if stored != upright else ""
    raise DataError(
        f"{name}: the image has {stored[1]}×{stored[0]} pixels{turned}, its annotation is for "
        f"{annotated[1]}×{annotated[0]}; annotate the image as it is stored here, or resize it back"
    )


def turned_pixels(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """An array (…, h, w) in the frame of the stored image, turned upright."""
    swap, left_right, up_down = _STEPS[orientation]
    if swap:
        pixels = pixels.swapaxes(-1, -2)
    if left_right:
        pixels = pixels[..., ::-1]
    return pixels[..., ::-1, :] if up_down else pixels


def turned_boxes(boxes: Tensor, size: tuple[int, int], orientation: int) -> Tensor:
    """Boxes (n, 4) in the frame of the stored image, turned upright.

    Args:
        boxes: Left, top, right and bottom.
        size: Height and width of the stored image.
        orientation: EXIF's.
    """
    swap, left_right, up_down = _STEPS[orientation]
    left, top, right, bottom = boxes.unbind(1)
    height, width = size
    if swap:
        left, top, right, bottom = top, left, bottom, right
        height, width = width, height
    if left_right:
        left, right = width - right, width - left
    if up_down:
        top, bottom = height - bottom, height - top
    return torch.stack([left, top, right, bottom], 1)
