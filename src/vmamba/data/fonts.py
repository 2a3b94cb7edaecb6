"""Text in pictures: a font with most alphabets, and what to do where it lacks a character or room."""

import unicodedata
from functools import cache
from typing import Any

from PIL import ImageFont


@cache
def font_of(size: int) -> Any:
    """A font of a size in pixels, with most alphabets where Matplotlib is installed."""
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


def drawable(text: str, font: Any) -> str:
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


def fitting(draw: Any, text: str, font: Any, room: int, keep_end: bool = False) -> str:
    """The text, shortened by dots until it fits."""
    if draw.textlength(text, font=font) <= room:
        return text
    for length in range(len(text) - 1, 0, -1):
        short = f"...{text[-length:]}" if keep_end else f"{text[:length].rstrip()}..."
        if draw.textlength(short, font=font) <= room:
            return short
    return ""
