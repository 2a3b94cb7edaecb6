"""A sheet of the images of an evaluation that went worst: the truth beside the prediction."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from vmamba.data.fonts import drawable, fitting, font_of
from vmamba.files import replacing

SHOWN = 12
"""Most images on a sheet."""

SIDE = 480
"""Longer side of each picture, in pixels."""

_MARGIN, _TITLE = 16, 15


class Pair(NamedTuple):
    """One image of the sheet.

    Attributes:
        name: Of the image.
        score: What it is judged by.
        truth: The image with what is annotated.
        prediction: The image with what is predicted.
    """

    name: str
    score: str
    truth: Image.Image
    prediction: Image.Image


def draw_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """Write pairs below each other, two in a row, as PNG; without pairs remove an earlier sheet.

    Raises:
        OSError: It cannot be written.
    """
    blocks = [_block(pair) for pair in pairs]
    if not blocks:
        path.unlink(missing_ok=True)
        return
    rows = [blocks[start : start + 2] for start in range(0, len(blocks), 2)]
    width = _MARGIN + max(sum(block.width + _MARGIN for block in row) for row in rows)
    height = _MARGIN + sum(max(block.height for block in row) + _MARGIN for row in rows)
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    top = _MARGIN
    for row in rows:
        left = _MARGIN
        for block in row:
            sheet.paste(block, (left, top))
            left += block.width + _MARGIN
        top += max(block.height for block in row) + _MARGIN
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")


def _block(pair: Pair) -> Image.Image:
    """Two pictures side by side, with the name and the score above them."""
    font = font_of(_TITLE)
    line = _TITLE + 8
    gap = _MARGIN // 2
    width = 2 * SIDE + gap
    size = (width, 2 * line + max(pair.truth.height, pair.prediction.height))
    block = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(block)
    extent = draw.textlength(pair.score, font=font)
    draw.text((width - extent, 0), pair.score, fill=(20, 20, 20), font=font)
    name = fitting(draw, drawable(pair.name, font), font, int(width - extent - gap), keep_end=True)
    draw.text((0, 0), name, fill=(20, 20, 20), font=font)
    for left, heading, image in ((0, "truth", pair.truth), (SIDE + gap, "prediction", pair.prediction)):
        draw.text((left, line), heading, fill=(120, 120, 120), font=font)
        block.paste(image, (left, 2 * line))
    return block
