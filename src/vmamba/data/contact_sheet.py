"""Contact sheets: thumbnails in a grid, with the model's prediction below each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vmamba.data.decoding import DecodedImage
from vmamba.data.fonts import drawable, fitting, font_of
from vmamba.files import replacing

MOST = 1000
"""Most images on a sheet; a JPEG cannot be much larger."""

_SIDE = 176
"""Side of a thumbnail, in pixels."""
_MARGIN = 10
_LINE = 17
_SIZES = (14, 11)
_INK, _PALE, _WRONG = (20, 20, 20), (120, 120, 120), (190, 30, 30)


@dataclass(frozen=True)
class Cell:
    """One image of a sheet.

    Attributes:
        name: The image's name.
        image: The image, or None if it could not be read.
        title: The most likely class, or the error.
        detail: Its probability, at the right of the title.
    """

    name: str
    image: Image.Image | None
    title: str
    detail: str = ""


def picture(image: DecodedImage) -> Image.Image:
    """A decoded image as Pillow's; of a tensor (c, h, w) the first three channels, or the first one."""
    if isinstance(image, Image.Image):
        return image
    pixels = image[: 3 if len(image) >= 3 else 1].mul(255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def thumbnail(image: Image.Image) -> Image.Image:
    """The image at the size that it has on a sheet, in RGB."""
    scale = _SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height))


def draw_sheet(cells: Sequence[Cell], path: Path) -> None:
    """Write a grid of images as PNG or JPEG, by the file's suffix.

    Raises:
        OSError: It cannot be written.
    """
    columns = max(1, min(len(cells), round((1.4 * len(cells)) ** 0.5)))
    rows = -(-len(cells) // columns)
    width, height = _SIDE + _MARGIN, _SIDE + 2 * _LINE + 4 + _MARGIN
    sheet = Image.new("RGB", (columns * width + _MARGIN, rows * height + _MARGIN), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for number, cell in enumerate(cells):
        left = _MARGIN + number % columns * width
        top = _MARGIN + number // columns * height
        _draw_cell(sheet, draw, cell, left, top)
    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    with replacing(path) as temporary:
        options = {"quality": 90} if kind == "JPEG" else {}
        sheet.save(temporary, kind, **options)


def _draw_cell(sheet: Any, draw: Any, cell: Cell, left: int, top: int) -> None:
    draw.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill=(238, 238, 238))
    if cell.image is not None:
        small_image = thumbnail(cell.image)
        width, height = small_image.size
        sheet.paste(small_image, (left + (_SIDE - width) // 2, top + (_SIDE - height) // 2))
    large, small = font_of(_SIZES[0]), font_of(_SIZES[1])
    below = top + _SIDE + 3
    room = _SIDE
    if cell.detail:
        extent = draw.textlength(cell.detail, font=large)
        draw.text((left + _SIDE - extent, below), cell.detail, fill=_PALE, font=large)
        room = int(_SIDE - extent - 8)
    title = fitting(draw, drawable(cell.title, large), large, room)
    draw.text((left, below), title, fill=_INK if cell.image is not None else _WRONG, font=large)
    name = fitting(draw, drawable(cell.name, small), small, _SIDE, keep_end=True)
    draw.text((left, below + _LINE), name, fill=_PALE, font=small)
