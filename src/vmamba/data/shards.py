"""WebDataset shards: tars of `<key>.jpg` with `<key>.cls`.

WebDataset itself reads them as streams, whose order depends on the workers and cannot be taken up again in
the middle. Here a shard is indexed, and its samples are read by number.
"""

import glob
import itertools
import json
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vmamba.data.classification import EXTENSIONS, ImageSource, read_image
from vmamba.data.storage import file_system, is_url
from vmamba.data.tar import TarIndex, TarReader, index_tars
from vmamba.errors import DataError


def read_classes(names: str | Path | int) -> list[str]:
    """The classes of labels 0, 1, …: a number of them, or a text file with a name a line.

    Raises:
        DataError: The file is missing, or a name is empty or stands twice.
    """
    if isinstance(names, int):
        return [str(number) for number in range(names)]
    try:
        found = [line.strip() for line in Path(names).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{names}: cannot read the names of the classes ({error})") from None
    if not found or not all(found) or len(set(found)) < len(found):
        raise DataError(f"{names}: expected a name a line, none empty and none twice")
    return found


def expand_braces(pattern: str) -> list[str]:
    """`train-{000..127}.tar` and `{a,b}.tar` as a shell reads them.

    Raises:
        DataError: A brace holds neither a range nor a list.
    """
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, close, tail = rest.partition("}")
    between = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if between:
        first, last = between.groups()
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",") if "," in inside and "{" not in inside else []
    if not close or not choices:
        raise DataError(f"{pattern}: expected {{first..last}} or {{a,b,…}}, got {{{inside}{close}")
    return [head + choice + end for choice in choices for end in expand_braces(tail)]


def find_shards(root: str, patterns: Sequence[str]) -> list[str]:
    """Paths or addresses of the shards under a folder that patterns name, in the patterns' order.

    Args:
        root: A folder, or the address of one in object storage.
        patterns: Of names in it, with braces (`expand_braces`) or `*`, `?` and `[…]`.

    Raises:
        DataError: A pattern matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in itertools.chain.from_iterable(map(expand_braces, patterns)):
        path = f"{root.rstrip('/')}/{pattern}"
        if is_url(root):
            fs, inside = file_system(path)
            try:
                names = fs.glob(inside) if glob.has_magic(pattern) else [inside]
                matching = sorted(fs.unstrip_protocol(name) for name in names)
            except Exception as error:  # every storage raises its own
                raise DataError(f"{path}: cannot list the shards ({error!r})") from error
        elif not glob.has_magic(pattern):
            matching = [path]
        else:
            matching = sorted(glob.glob(path))
        if not matching:
            raise DataError(f"{path}: no shard matches")
        found |= dict.fromkeys(matching)
    return list(found)


class Shards(ImageSource):
    """Samples `<key>.<image>` with `<key>.cls`, or `<key>.json` with "label", in tars on this machine.

    Args:
        paths: The tars.
        classes: Their names, by label.
        mode: "RGB" or "L".
        called: What to call each tar in messages; default its path.

    Raises:
        DataError: A tar is missing or damaged, or a sample lacks image or label; the message names it.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        classes: list[str],
        mode: str = "RGB",
        called: Sequence[str] | None = None,
    ) -> None:
        index = index_tars(paths)
        self.classes, self.mode, self.called = classes, mode, called or index.tars
        self.reader = TarReader(index)
        self.images, self.labels = _samples(index, self.called)

    def __str__(self) -> str:
        return between(self.called)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        name = self.name(index)
        label = self._label(self.reader.read(self.labels[index]), self.labels[index], name)
        return read_image(BytesIO(self.reader.read(self.images[index])), self.mode, name), label

    def _label(self, text: bytes, member: int, name: str) -> int:
        try:
            in_json = self.reader.index.names[member].lower().endswith(".json")
            label = json.loads(text)["label"] if in_json else int(text)
            if type(label) is int and 0 <= label < len(self.classes):
                return label
        except (ValueError, TypeError, KeyError):
            label = text[:40].decode(errors="replace")
        raise DataError(f"{name}: expected a label from 0 to {len(self.classes) - 1}, got {label!r}")

    def name(self, index: int) -> str:
        member = self.images[index]
        return f"{self.called[self.reader.index.tar[member]]}/{self.reader.index.names[member]}"


def _samples(index: TarIndex, called: Sequence[str]) -> tuple[Any, Any]:
    """Of each sample, in the order of the tars, the files that hold its image and its label."""
    found: dict[tuple[int, str], list[int]] = {}
    for member, (tar, name) in enumerate(zip(index.tar.tolist(), index.names, strict=True)):
        folder, slash, file = name.rpartition("/")
        key, _, extension = file.partition(".")
        part = {"cls": 1, "json": 2}.get(
            extension.lower(), 0 if f".{extension.lower()}" in EXTENSIONS else None
        )
        if part is None or not key:
            continue
        parts = found.setdefault((tar, folder + slash + key), [-1, -1, -1])
        if parts[part] >= 0:
            raise DataError(f"{called[tar]}/{name}: a second image or label of the same sample")
        parts[part] = member
    for (tar, key), (image, cls, description) in found.items():
        if image < 0 or max(cls, description) < 0:
            raise DataError(
                f"{called[tar]}: sample {key} has no {'image' if image < 0 else 'label'}; expected "
                f"{key}.jpg (or another image) and {key}.cls or {key}.json"
            )
    if not found:
        raise DataError(f"{between(called)}: no samples; expected <key>.jpg and <key>.cls")
    table = np.array(list(found.values()), dtype=np.int64)
    return table[:, 0].copy(), np.where(table[:, 1] >= 0, table[:, 1], table[:, 2])


def between(names: Sequence[str]) -> str:
    """Names of many files in a few words."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
