"""Images with objects or classes of pixels drawn over them, and a legend below.

n objects, h height, w width.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from vmamba.data.contact_sheet import picture
from vmamba.data.decoding import DecodedImage
from vmamba.data.fonts import drawable, fitting, font_of
from vmamba.data.objects import decoded_masks
from vmamba.labels import IGNORED

SMALLEST = 256
"""Images with a smaller longer side are enlarged, so that there is room for what is drawn."""

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Entry = tuple[Colour | None, str, str]
"""Of a legend: a colour, or None for an empty field, a name and a number."""
Masks = Tensor | Sequence[Tensor | Mapping[str, Any]] | None

FIRST_COLOURS: tuple[Colour, ...] = (
    (213, 94, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (204, 121, 167),
    (230, 159, 0),
)
"""Of Okabe and Ito, which people with any colour vision tell apart."""

_WHITE, _BLACK, _GREY = (255, 255, 255), (0, 0, 0), (128, 128, 128)


def colour(label: int) -> Colour:
    """The colour of a class by its number, the same whatever other classes there are."""
    colours = _colours()
    return colours[label % len(colours)]


@cache
def _colours() -> list[Colour]:
    """256 colours, each as unlike as possible to those before it, and to black, white and grey (in OKLab)."""
    steps = torch.linspace(0, 255, 18).round()
    candidates = torch.cartesian_prod(steps, steps, steps)
    places = _oklab(candidates)
    vivid = (places[:, 0] > 0.5) & (places[:, 1:].norm(dim=1) > 0.07)  # a tint of others looks like a shadow
    candidates, places = candidates[vivid], places[vivid]
    places_taken = _oklab(torch.tensor([_WHITE, _BLACK, _GREY, *FIRST_COLOURS]))
    distance = torch.cdist(places, places_taken).amin(1)
    colours = list(FIRST_COLOURS)
    while len(colours) < 256:
        farthest = int(distance.argmax())
        red, green, blue = map(int, candidates[farthest].tolist())
        colours.append((red, green, blue))
        distance = distance.minimum((places - places[farthest]).norm(dim=1))
    return colours


def _oklab(colours: Tensor) -> Tensor:
    """sRGB (n, 3) of 0 … 255 as lightness and two axes of hue, where distances are as the eye sees them."""
    values = colours.double() / 255
    linear = torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    cones = (linear @ linear.new_tensor(to_cones).T).clamp(min=0) ** (1 / 3)
    return cones @ linear.new_tensor(to_lab).T


def contrast(of: Colour) -> Colour:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = ((value / 255) ** 2.2 for value in of)
    return _BLACK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else _WHITE


def draw_objects(
    image: DecodedImage,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None,
    masks: Masks,
    names: Sequence[str],
    *,
    legend: bool = True,
    side: int | None = None,
) -> Image.Image:
    """Draw objects in the colours of their classes: tinted masks with an outline, boxes with name and score.

    Where there is no room for the name beside a box it is left out, first those with low scores.

    Args:
        image: Of any size and mode.
        boxes: (n, 4), x1 y1 x2 y2 in the image's pixels.
        labels: Classes (n,), from 0.
        scores: (n,); None if there are none, as of annotations.
        masks: n masks (h, w) with 0 and 1, or run-length codes of COCO; None to draw boxes alone.
        names: Of all classes.
        legend: Write the names of the classes and the number of their objects below the image.
        side: Longer side of the image in the picture, in pixels; None for the size that the image has, or
            a whole multiple of it that is at least 256.

    Returns:
        The image, with the legend below it.

    Raises:
        ValueError: Numbers, sizes or classes do not fit.
    """
    classes = labels.tolist()
    _check_objects(image, boxes, classes, scores, masks, names)
    canvas = _Canvas(image, side)
    width, height = picture(image).size  # annotated boxes may reach over the border
    boxes = boxes.double().cpu().clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    corners = (boxes * canvas.scale).tolist()
    largest_first = sorted(range(len(classes)), key=lambda n: -_area(corners[n]))
    if masks is not None:
        for number in largest_first:
            canvas.draw_mask(_pixels(masks[number]), colour(classes[number]))
    for number in largest_first:
        canvas.draw_box(corners[number], colour(classes[number]))
    values = [1.0] * len(classes) if scores is None else scores.tolist()
    for number in sorted(range(len(classes)), key=lambda n: -values[n]):
        score = "" if scores is None else f"{values[number]:.2f}"
        canvas.draw_name(corners[number], names[classes[number]], score, colour(classes[number]))
    counts = sorted(Counter(classes).items(), key=lambda pair: (-pair[1], pair[0]))
    entries: list[Entry] = [(colour(label), names[label], f"× {count}") for label, count in counts]
    return canvas.with_legend(entries if legend else [])


def draw_segmentation(
    image: DecodedImage,
    labels: Tensor | NDArray[Any],
    names: Sequence[str],
    *,
    legend: bool = True,
    side: int | None = None,
) -> Image.Image:
    """Tint the pixels of an image in the colours of their classes.

    Args:
        image: Of any size and mode.
        labels: The class of each pixel (h, w), or 255 for none, which stays as it is. A map of another size
            than the image is stretched over it.
        names: Of all classes.
        legend: Write the names of the classes and their share of the pixels below the image.
        side: As of `draw_objects`.

    Returns:
        The image, with the legend below it.

    Raises:
        ValueError: There is a class without a name.
    """
    classes = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    unnamed = (classes < 0) | (classes >= len(names)) & (classes != IGNORED)
    if unnamed.any():
        raise ValueError(f"labels: expected 0 to {len(names) - 1} or {IGNORED}, got {classes[unnamed][0]}")
    counts = np.bincount(classes.ravel(), minlength=IGNORED + 1)
    canvas = _Canvas(image, side)
    canvas.draw_classes(classes)
    entries: list[Entry] = []
    for label in np.argsort(-counts, kind="stable").tolist():
        if counts[label]:
            share = _percent(counts[label] / classes.size)
            of, name = (None, "no class") if label == IGNORED else (colour(label), names[label])
            entries.append((of, name, share))
    return canvas.with_legend(entries if legend else [])


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "< 1%"


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _check_objects(
    image: DecodedImage,
    boxes: Tensor,
    classes: list[int],
    scores: Tensor | None,
    masks: Masks,
    names: Sequence[str],
) -> None:
    number = len(classes)
    if tuple(boxes.shape) != (number, 4):
        raise ValueError(f"boxes: expected {(number, 4)}, by the labels, got {tuple(boxes.shape)}")
    for name, values in (("scores", scores), ("masks", masks)):
        if values is not None and len(values) != number:
            raise ValueError(f"{name}: expected {number}, by the labels, got {len(values)}")
    if classes and not (min(classes) >= 0 and max(classes) < len(names)):
        raise ValueError(f"labels: expected 0 to {len(names) - 1}, got {classes}")
    size = picture(image).size[::-1]
    for index, mask in enumerate(masks if masks is not None else ()):
        shape = tuple(mask["size"] if isinstance(mask, Mapping) else mask.shape)
        if shape != size:
            raise ValueError(f"masks[{index}]: expected the image's size {size}, got {shape}")


def _pixels(mask: Tensor | Mapping[str, Any]) -> NDArray[np.bool_]:
    """A mask as (h, w)."""
    values = decoded_masks([mask], mask["size"])[0] if isinstance(mask, Mapping) else mask.cpu()
    return values.bool().numpy()


class _Canvas:
    """An image to draw on, with lines and letters that fit its size.

    Args:
        image: Of any size and mode.
        side: See `draw_objects`.

    Attributes:
        scale: The picture's size over the image's.
    """

    def __init__(self, image: DecodedImage, side: int | None) -> None:
        rgb = picture(image).convert("RGB")
        longer = max(rgb.size)
        self.scale = max(1, -(-SMALLEST // longer)) if side is None else side / longer
        size = (max(1, round(rgb.width * self.scale)), max(1, round(rgb.height * self.scale)))
        if rgb.size != size:  # a much enlarged image shows its pixels
            method = Image.Resampling.NEAREST if self.scale >= 2 else Image.Resampling.BILINEAR
            rgb = rgb.resize(size, method)
        self._image = rgb
        extent = (rgb.width * rgb.height) ** 0.5
        self._line = max(2, round(extent / 300))
        self._em = max(11, round(extent / 45))
        self._font = font_of(self._em)
        self._names: list[Box] = []

    def draw_mask(self, mask: NDArray[np.bool_], of: Colour) -> None:
        """Tint a mask and draw its outline, thin in black or white outside."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return
        # Only the mask's surroundings are worked on: an image may be large and have a hundred objects.
        region = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        left, top, right, bottom = (
            round(edge * self.scale) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        )
        right, bottom = max(right, left + 1), max(bottom, top + 1)
        margin = self._line + 1
        inside = np.asarray(Image.fromarray(region).resize((right - left, bottom - top)), bool)
        inside = np.pad(inside, margin)
        outline = inside & ~_shrunk(inside, self._line)
        casing = ~inside & ~_shrunk(~inside, max(1, self._line // 2))
        corner = (left - margin, top - margin)
        self._tint(inside & ~outline, corner, of, 0.42)
        self._tint(casing, corner, contrast(of), 0.5)
        self._tint(outline, corner, of, 1.0)

    def _tint(self, mask: NDArray[np.bool_], corner: tuple[int, int], of: Colour, strength: float) -> None:
        stencil = Image.fromarray(np.where(mask, np.uint8(round(255 * strength)), np.uint8(0)))
        self._image.paste(of, corner, stencil)

    def draw_box(self, box: Sequence[float], of: Colour) -> None:
        """Draw a box between black or white lines, so that it can be seen on any background."""
        left, top, right, bottom = (round(edge) for edge in box)
        draw = ImageDraw.Draw(self._image)
        width = self._line
        casing = max(1, width // 2)
        right, bottom = max(right - 1, left), max(bottom - 1, top)
        outer = (left - casing, top - casing, right + casing, bottom + casing)
        draw.rectangle(outer, outline=contrast(of), width=casing)
        draw.rectangle((left, top, right, bottom), outline=of, width=width)

    def draw_name(self, box: Sequence[float], name: str, score: str, of: Colour) -> None:
        """Write name and score above a box, else in it or below, where nothing is written; else nowhere."""
        draw = ImageDraw.Draw(self._image)
        width, height = self._image.size
        margin = max(2, self._em // 5)
        room = min(width, max(box[2] - box[0], 12 * self._em)) - 2 * margin
        text = self._shortened(draw, name, score, room)
        extent = draw.textlength(text, font=self._font) + 2 * margin
        tall = self._text_height(draw) + margin
        left, top, right, bottom = box
        for x, y in (
            (left, top - tall),
            (left, top),
            (left, bottom),
            (left, bottom - tall),
            (right - extent, top - tall),
            (right - extent, top),
            (right - extent, bottom - tall),
        ):
            x = min(max(x, 0), width - extent)
            if y < 0 or y + tall > height:
                continue
            place = (x, y, x + extent, y + tall)
            if not any(_overlap(place, other) for other in self._names):
                self._names.append(place)
                draw.rectangle((round(x), round(y), round(x + extent) - 1, round(y + tall) - 1), fill=of)
                self._write(draw, (x + margin, y + margin / 2), text, contrast(of))
                return

    def _shortened(self, draw: Any, name: str, score: str, room: float) -> str:
        for_name = room - (draw.textlength(f" {score}", font=self._font) if score else 0)
        short = fitting(draw, drawable(name, self._font), self._font, int(for_name))
        return f"{short} {score}".strip()

    def _text_height(self, draw: Any) -> float:
        _, top, _, bottom = draw.textbbox((0, 0), "Ág", font=self._font)
        return float(bottom - top)

    def _write(self, draw: Any, corner: tuple[float, float], text: str, of: Colour) -> None:
        _, top, _, _ = draw.textbbox((0, 0), "Ág", font=self._font)
        draw.text((round(corner[0]), round(corner[1] - top)), text, fill=of, font=self._font)

    def draw_classes(self, classes: NDArray[Any]) -> None:
        """Tint pixels by class."""
        tints = Image.fromarray(classes.astype(np.uint8)).resize(self._image.size, Image.Resampling.NEAREST)
        labels = np.asarray(tints)
        border = np.zeros(labels.shape, bool)
        border[:-1] |= labels[:-1] != labels[1:]
        border[:, :-1] |= labels[:, :-1] != labels[:, 1:]
        strength = np.where(border, np.uint8(255), np.uint8(165))
        strength[labels == IGNORED] = 0
        tints.putpalette([value for label in range(256) for value in colour(label)])
        self._image.paste(tints.convert("RGB"), (0, 0), Image.fromarray(strength))

    def with_legend(self, entries: Sequence[Entry]) -> Image.Image:
        """The picture, with the entries below it in as many columns as fit."""
        if not entries:
            return self._image
        draw = ImageDraw.Draw(self._image)
        width, height = max(self._image.width, 14 * self._em), self._image.height
        em, gap = self._em, self._em // 2
        row = round(1.5 * em)
        room = min(width - 3 * gap - em, 24 * em)
        texts = [self._shortened(draw, name, number, room) for _, name, number in entries]
        longest = max(draw.textlength(text, font=self._font) for text in texts)
        columns = max(1, int((width - gap) // (longest + em + 3 * gap)))
        rows = -(-len(entries) // columns)
        sheet = Image.new("RGB", (width, height + rows * row + gap), _WHITE)
        sheet.paste(self._image)
        draw = ImageDraw.Draw(sheet)
        for number, ((of, _, _), text) in enumerate(zip(entries, texts, strict=True)):
            x = gap + number % columns * ((width - gap) // columns)
            y = height + gap // 2 + number // columns * row + (row - em) // 2
            draw.rectangle((x, y, x + em - 1, y + em - 1), fill=of, outline=_GREY)
            middle = y + em / 2 - self._text_height(draw) / 2
            self._write(draw, (x + em + gap, middle), text, (20, 20, 20))
        return sheet


def _shrunk(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """A mask without the pixels that are within `by` rows or columns of its outside."""
    width = 2 * by + 1
    for axis in (0, 1):
        counts = np.pad(mask, by, constant_values=True).swapaxes(0, axis)[:, by:-by].cumsum(0, np.int32)
        counts = np.concatenate([counts[:1] * 0, counts])
        mask = (counts[width:] - counts[:-width] == width).swapaxes(0, axis)
    return mask


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
