"""Read a file in COCO's instance format into compact arrays, and refuse what is wrong in it.

Letters in shapes: n annotations, m images.
"""

import json
import logging
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import numpy as np
from numpy.typing import NDArray

from vmamba.data.decoding import printable
from vmamba.data.objects import run_lengths
from vmamba.data.strings import PackedStrings
from vmamba.errors import DataError
from vmamba.words import counted

log = logging.getLogger(__name__)

FARTHEST = 100_000
"""Coordinates beyond it are refused: pycocotools walks along an outline pixel by pixel."""

NO_AREA = "a box without area, or an inverted one"
NO_OUTLINE = "no outline, or one without area"


class Outlines:
    """Polygons or a run-length code for each annotation.

    Coordinates of up to two decimals, as COCO's are, are kept as whole hundredths, which give the same
    numbers back: 2 bytes each in images of up to 655 pixels.

    Args:
        values: The coordinates of all polygons.
        polygon_ends: Where each polygon ends in `values`.
        ends: Where each annotation's polygons end in `polygon_ends`.
        codes: The bytes of all run-length codes.
        code_ends: Where each annotation's code ends in `codes`; those with polygons have none.
    """

    def __init__(
        self,
        values: NDArray[np.float64],
        polygon_ends: NDArray[np.int64],
        ends: NDArray[np.int64],
        codes: NDArray[np.uint8],
        code_ends: NDArray[np.int64],
    ) -> None:
        hundredths = np.rint(values * 100)
        self.exact = bool((hundredths / 100 == values).all())
        if self.exact and len(values):
            smallest = np.promote_types(
                np.min_scalar_type(int(hundredths.min())), np.min_scalar_type(int(hundredths.max()))
            )
            values = hundredths.astype(smallest)
        self.values, self.polygon_ends, self.ends = values, polygon_ends, ends
        self.codes, self.code_ends = codes, code_ends

    def code(self, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """An annotation's mask as a run-length code; see `Objects`.

        Args:
            index: Of the annotation.
            size: Height and width of its image.
        """
        start = self.code_ends[index - 1] if index else 0
        if code := self.codes[start : self.code_ends[index]].tobytes():
            return {"size": list(size), "counts": code}
        mask = run_lengths()
        merged: dict[str, Any] = mask.merge(mask.frPyObjects(self._polygons(index), *size))
        return merged

    def _polygons(self, index: int) -> list[NDArray[np.float64]]:
        first = int(self.ends[index - 1]) if index else 0
        polygons = []
        for polygon in range(first, int(self.ends[index])):
            start = self.polygon_ends[polygon - 1] if polygon else 0
            values = self.values[start : self.polygon_ends[polygon]].astype(np.float64)
            polygons.append(values / 100 if self.exact else values)
        return polygons


@dataclass
class Instances:
    """What an annotation file says; its images and annotations are in the file's order.

    COCO's train2017, 860,000 annotations of 118,000 images, takes about 200 MB: 150 of coordinates, 45 of the
    other arrays. They hold no Python objects, so that forked workers share them.

    Attributes:
        classes: Names of the categories, in the order of their ids.
        category_ids: Their ids.
        image_ids: (m,).
        file_names: Of the images.
        sizes: (m, 2), height and width of the images.
        ids: (n,), of the annotations.
        image_of: (n,), the index of each annotation's image.
        labels: (n,), indices into `classes`.
        boxes: (n, 4), left, top, right and bottom as annotated: they may reach over the image's border.
        areas: (n,), NaN where the file has none.
        crowd: (n,).
        outlines: A mask for each.
    """

    classes: list[str]
    category_ids: list[int]
    image_ids: NDArray[np.int64]
    file_names: PackedStrings
    sizes: NDArray[np.int32]
    ids: NDArray[np.int64]
    image_of: NDArray[np.int32]
    labels: NDArray[np.int32]
    boxes: NDArray[np.float32]
    areas: NDArray[np.float32]
    crowd: NDArray[np.bool_]
    outlines: Outlines


def read_instances(path: str | Path) -> Instances:
    """Read an annotation file.

    Objects with a box that is empty or inverted, or without an outline that has an area, are left out; how
    many is logged.

    Raises:
        DataError: The file is missing, damaged, of another format, or contradicts itself; the message names
            it and the id of what is wrong.
    """
    content = _read_json(path)
    return _Reader(printable(str(path)), content).read()


def _read_json(path: str | Path) -> dict[str, Any]:
    name = printable(str(path))
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{name}: no such annotation file; expected one in COCO's instance format") from None
    except OSError as error:
        raise DataError(f"{name}: cannot read the annotation file ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: not JSON, or a truncated file ({error}); expected COCO's instance format"
        ) from None
    other = _other_format(content)
    if other is not None:
        raise DataError(
            f"{name}: {other}; expected COCO's instance format, an object with lists 'images', 'annotations' "
            "and 'categories'"
        )
    checked: dict[str, Any] = content
    return checked


def _other_format(content: Any) -> str | None:
    """What a file is if not of COCO's instance format."""
    if isinstance(content, list):
        first = content[0] if content else None
        results = isinstance(first, dict) and "score" in first
        return "a list of results, which are predictions" if results else "a list"
    if not isinstance(content, dict):
        return f"{type(content).__name__} instead of an object"
    if "shapes" in content and "imagePath" in content:
        return "a file of LabelMe; convert its folder to one COCO file"
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(content.get(k), list)]
    if missing:
        return f"no list {' and no list '.join(map(repr, missing))} in it"
    first = next((entry for entry in content["annotations"] if isinstance(entry, dict)), {})
    if "segments_info" in first:
        return "panoptic annotations"
    if "caption" in first:
        return "captions"
    return None


@dataclass
class _Columns:
    """What is collected of the annotations that are kept."""

    ids: "array[int]" = field(default_factory=lambda: array("q"))
    image_of: "array[int]" = field(default_factory=lambda: array("i"))
    labels: "array[int]" = field(default_factory=lambda: array("i"))
    boxes: "array[float]" = field(default_factory=lambda: array("f"))
    areas: "array[float]" = field(default_factory=lambda: array("f"))
    crowd: "array[int]" = field(default_factory=lambda: array("b"))
    values: "array[float]" = field(default_factory=lambda: array("d"))
    polygon_ends: "array[int]" = field(default_factory=lambda: array("q"))
    ends: "array[int]" = field(default_factory=lambda: array("q"))
    codes: bytearray = field(default_factory=bytearray)
    code_ends: "array[int]" = field(default_factory=lambda: array("q"))

    def outlines(self) -> Outlines:
        return Outlines(
            np.array(self.values, dtype=np.float64),
            np.array(self.polygon_ends, dtype=np.int64),
            np.array(self.ends, dtype=np.int64),
            np.array(self.codes, dtype=np.uint8),
            np.array(self.code_ends, dtype=np.int64),
        )


class _Reader:
    """Reads the content of a file.

    Args:
        name: Of the file, for messages.
        content: Its JSON, of which the lists exist.
    """

    def __init__(self, name: str, content: Mapping[str, list[Any]]) -> None:
        self.name, self.content = name, content
        self.left_out: Counter[str] = Counter()
        self.columns = _Columns()

    def read(self) -> Instances:
        category_ids, classes = self._categories()
        image_ids, file_names, sizes = self._images()
        number_of = {number: index for index, number in enumerate(image_ids)}
        label_of = {number: label for label, number in enumerate(category_ids)}
        for where, annotation in self._entries("annotations", "annotation"):
            self._annotation(where, annotation, number_of, label_of, sizes)
        self._report()
        columns = self.columns
        return Instances(
            classes,
            category_ids,
            np.array(image_ids, dtype=np.int64),
            PackedStrings.of(file_names),
            np.array(sizes, dtype=np.int32).reshape(-1, 2),
            np.array(columns.ids, dtype=np.int64),
            np.array(columns.image_of, dtype=np.int32),
            np.array(columns.labels, dtype=np.int32),
            np.array(columns.boxes, dtype=np.float32).reshape(-1, 4),
            np.array(columns.areas, dtype=np.float32),
            np.array(columns.crowd, dtype=np.bool_),
            columns.outlines(),
        )

    def _refuse(self, where: str, what: str) -> NoReturn:
        raise DataError(f"{self.name}: {where}: {what}")

    def _entries(self, key: str, noun: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of a list with what to call them in messages, once their ids are known to differ."""
        seen: set[int] = set()
        for position, entry in enumerate(self.content[key]):
            place = f"{key}[{position}]"
            if not isinstance(entry, dict):
                self._refuse(place, f"expected an object, got {entry!r:.60}")
            number = entry.get("id")
            if not _is_whole(number):
                self._refuse(place, f"expected a whole number as its id, got {number!r:.60}")
            if number in seen:
                self._refuse(f"{noun} {number}", f"a second {noun} of this id")
            seen.add(number)
            yield f"{noun} {number}", entry

    def _categories(self) -> tuple[list[int], list[str]]:
        names: dict[int, str] = {}
        for where, category in self._entries("categories", "category"):
            name = category.get("name")
            if not isinstance(name, str) or not name:
                self._refuse(where, f"expected a name, got {name!r:.60}")
            if name in names.values():
                self._refuse(where, f"a second category called {name!r}")
            names[category["id"]] = name
        if not names:
            raise DataError(f"{self.name}: no categories in it")
        ids = sorted(names)
        return ids, [names[number] for number in ids]

    def _images(self) -> tuple[list[int], list[str], list[tuple[int, int]]]:
        ids, files, sizes = [], [], []
        for where, image in self._entries("images", "image"):
            file = image.get("file_name")
            if not isinstance(file, str) or not file:
                self._refuse(where, f"expected a file_name, got {file!r:.60}")
            height, width = image.get("height"), image.get("width")
            if not (_is_whole(height) and _is_whole(width) and min(height, width) > 0):
                self._refuse(where, f"expected its height and width in pixels, got {height!r}, {width!r}")
            ids.append(image["id"])
            files.append(file)
            sizes.append((int(height), int(width)))
        if not ids:
            raise DataError(f"{self.name}: no images in it")
        return ids, files, sizes

    def _annotation(
        self,
        where: str,
        annotation: dict[str, Any],
        number_of: Mapping[int, int],
        label_of: Mapping[int, int],
        sizes: list[tuple[int, int]],
    ) -> None:
        """Check an annotation, and add it to the columns unless it is to be left out."""
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if not _is_whole(image) or image not in number_of:
            self._refuse(where, f"there is no image {image!r:.60}")
        if not _is_whole(category) or category not in label_of:
            self._refuse(where, f"there is no category {category!r:.60}")
        crowd, area = annotation.get("iscrowd", 0), annotation.get("area")
        if crowd not in (0, 1):
            self._refuse(where, f"iscrowd: expected 0 or 1, got {crowd!r:.60}")
        if area is not None and not _is_number(area):
            self._refuse(where, f"area: expected a number, got {area!r:.60}")
        size = sizes[number_of[image]]
        box = self._box(where, annotation.get("bbox"))
        outline = self._outline(where, annotation.get("segmentation"), size)
        if box is None or not outline:
            self.left_out[NO_AREA if box is None else NO_OUTLINE] += 1
            return
        columns = self.columns
        columns.ids.append(annotation["id"])
        columns.image_of.append(number_of[image])
        columns.labels.append(label_of[category])
        columns.boxes.extend(box)
        columns.areas.append(float("nan") if area is None else area)
        columns.crowd.append(int(crowd))
        if isinstance(outline, bytes):
            columns.codes += outline
        else:
            for polygon in outline:
                columns.values.extend(polygon)
                columns.polygon_ends.append(len(columns.values))
        columns.ends.append(len(columns.polygon_ends))
        columns.code_ends.append(len(columns.codes))

    def _box(self, where: str, box: Any) -> tuple[float, float, float, float] | None:
        """Left, top, right and bottom as annotated, or None if the box has no area."""
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            self._refuse(where, f"bbox: expected [x, y, width, height], finite numbers, got {box!r:.90}")
        x, y, width, height = box
        return (x, y, x + width, y + height) if width > 0 and height > 0 else None

    def _outline(
        self, where: str, outline: Any, size: tuple[int, int]
    ) -> "list[array[float]] | bytes | None":
        """Polygons, or a run-length code; None if they have no area."""
        if outline is None:
            return None
        if isinstance(outline, dict):
            return self._code(where, outline, size)
        if not isinstance(outline, list):
            self._refuse(where, f"segmentation: expected polygons or a run-length code, got {outline!r:.60}")
        polygons = []
        for polygon in outline:
            values = _coordinates(polygon)
            if values is None:
                self._refuse(
                    where,
                    "segmentation: expected polygons [x, y, x, y, …] of numbers within "
                    f"{FARTHEST:,} pixels, got {polygon!r:.60}",
                )
            if len(values) >= 6:  # two points have no area, and pycocotools takes them for a box
                polygons.append(values)
        return polygons if any(_has_area(values, size) for values in polygons) else None

    def _code(self, where: str, outline: dict[str, Any], size: tuple[int, int]) -> bytes | None:
        """A run-length code, compressed; None if it is empty."""
        counts, stated = outline.get("counts"), outline.get("size")
        if stated != list(size):
            self._refuse(
                where,
                f"segmentation: a run-length code of size {stated!r:.60}, its image has {list(size)} "
                "(height, width)",
            )
        if isinstance(counts, str):
            runs = _expand(counts)
        elif isinstance(counts, list) and all(map(_is_whole, counts)):
            runs = counts
        else:
            runs = None
        if runs is None or min(runs, default=0) < 0 or sum(runs) != size[0] * size[1]:
            self._refuse(
                where,
                "segmentation: a damaged run-length code; expected runs that add up to the image's "
                f"{size[0] * size[1]:,} pixels",
            )
        if not any(runs[1::2]):
            return None
        code: bytes = run_lengths().frPyObjects({"size": stated, "counts": runs}, *size)["counts"]
        return code

    def _report(self) -> None:
        """Log what is left out; refuse a file without any outlines."""
        total = self.left_out.total()
        if self.left_out[NO_OUTLINE] and not self.columns.ids:
            raise DataError(
                f"{self.name}: no annotation has an outline in 'segmentation'; Mask R-CNN learns masks, so "
                "that boxes alone are not enough"
            )
        if total:
            reasons = ", ".join(f"{number:,} with {reason}" for reason, number in self.left_out.items())
            log.warning("%s: left out %s: %s", self.name, counted(total, "annotation"), reasons)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _coordinates(polygon: Any) -> "array[float] | None":
    """The coordinates of a polygon, or None if they are none."""
    if not isinstance(polygon, list) or len(polygon) % 2:
        return None
    try:
        values = array("d", polygon)
    except (TypeError, OverflowError):
        return None
    near = np.abs(np.array(values)) <= FARTHEST  # NaN is not
    return values if near.all() else None


def _has_area(polygon: "array[float]", size: tuple[int, int]) -> bool:
    """Whether a polygon has an area, which one along a line has not.

    Args:
        polygon: Its coordinates.
        size: Height and width of its image.
    """
    values = np.array(polygon)
    x, y = values[::2] - values[0], values[1::2] - values[1]
    if abs(x[:-1] @ y[1:] - y[:-1] @ x[1:]) > 1e-6:
        return True
    # Halves that run in opposite directions, as in a bow tie, cancel in that sum.
    mask = run_lengths()
    return bool(mask.area(mask.frPyObjects([polygon.tolist()], *size)).any())


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _expand(code: str) -> list[int] | None:
    """The runs of COCO's compressed code, or None if it is damaged.

    Each is written in groups of 5 bits, the lowest first, as its difference to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in code:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return runs if shift == 0 else None
