"""Contact sheets: thumbnails in a grid, with the model's prediction below each."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vmamba.data.decoding import DecodedImage
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
    pixels = image[: 3 if len(image) >= 3 else 1].mul(255).byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


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
        scale = _SIDE / max(cell.image.size)
        width, height = (max(1, round(side * scale)) for side in cell.image.size)
        size = (width, height)
        thumbnail = cell.image.convert("RGB").resize(size)
        sheet.paste(thumbnail, (left + (_SIDE - size[0]) // 2, top + (_SIDE - size[1]) // 2))
    large, small = _font(_SIZES[0]), _font(_SIZES[1])
    below = top + _SIDE + 3
    room = _SIDE
    if cell.detail:
        extent = draw.textlength(cell.detail, font=large)
        draw.text((left + _SIDE - extent, below), cell.detail, fill=_PALE, font=large)
        room = int(_SIDE - extent - 8)
    title = _fitting(draw, _drawable(cell.title, large), large, room)
    draw.text((left, below), title, fill=_INK if cell.image is not None else _WRONG, font=large)
    name = _fitting(draw, _drawable(cell.name, small), small, _SIDE, keep_end=True)
    draw.text((left, below + _LINE), name, fill=_PALE, font=small)


@cache
def _font(size: int) -> Any:
    try:  # Pillow's font has not even the letters of French; Matplotlib brings one that has most alphabets
        import matplotlib

        path = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
        # The other layout raises for characters that are no text, such as a line break.
        return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    except (ImportError, OSError):
        pass
    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError):  # a Pillow before 10.1, or without FreeType: one size, Latin-1 alone
        return ImageFont.load_default()


def _drawable(text: str, font: Any) -> str:
    """The text; where the font lacks a character, it goes without its accents, or as its number."""
    composed = unicodedata.normalize("NFC", text)  # macOS keeps names with the accents apart
    return "".join(char if _has(font, char) else _plain(font, char) for char in composed)


def _plain(font: Any, char: str) -> str:
    letters = "".join(each for each in unicodedata.normalize("NFKD", char) if not unicodedata.combining(each))
    return letters if letters and all(_has(font, each) for each in letters) else f"\\u{ord(char):04x}"


@cache
def _has(font: Any, char: str) -> bool:
    """Whether a font has a character: for missing ones all glyphs are the same."""
    try:
        return char == " " or bytes(font.getmask(char)) != bytes(font.getmask("\U0010fffe"))
    except (UnicodeError, OSError):  # a bitmap font
        return char.isascii() and char.isprintable()


def _fitting(draw: Any, text: str, font: Any, room: int, keep_end: bool = False) -> str:
    """The text, shortened by dots until it fits."""
    if draw.textlength(text, font=font) <= room:
        return text
    for length in range(len(text) - 1, 0, -1):
        short = f"...{text[-length:]}" if keep_end else f"{text[:length].rstrip()}..."
        if draw.textlength(short, font=font) <= room:
            return short
    return ""
