"""WebDataset shards: tars of `<key>.jpg` with `<key>.cls`.

Not the package webdataset, because it reads shards as streams, whose order depends on the workers and which
cannot be resumed in the middle. Here a shard is indexed, and its samples are read by index.
"""

import glob
import itertools
import json
import re
from collections.abc import Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vmamba.data.classes import read_classes
from vmamba.data.decoding import RGB, Decoding, image_suffixes, printable
from vmamba.data.section import ClassificationSection, Split
from vmamba.data.source import ClassifiedImages
from vmamba.data.storage import file_system, is_url
from vmamba.data.tar_index import TarIndex, TarReader, index_tars
from vmamba.errors import DataError


def expand_braces(pattern: str) -> list[str]:
    """Expand `train-{000..127}.tar` and `{a,b}.tar` as a shell does.

    Raises:
        DataError: A brace holds neither a range nor a list.
    """
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    inside, close, tail = rest.partition("}")
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if bounds:
        first, last = bounds.groups()
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        choices = [f"{number:0{width}}" for number in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",") if "," in inside and "{" not in inside else []
    if not close or not choices:
        raise DataError(f"{pattern}: expected {{first..last}} or {{a,b,…}}, got {{{inside}{close}")
    return [head + choice + end for choice in choices for end in expand_braces(tail)]


def find_shards(root: str, patterns: Sequence[str]) -> list[str]:
    """Paths or addresses of the shards in a folder that match patterns, in the patterns' order.

    Args:
        root: A folder, or the address of one in object storage.
        patterns: Patterns of file names, with braces (`expand_braces`) or `*`, `?` and `[…]`.

    Raises:
        DataError: A pattern matches nothing.
    """
    paths: dict[str, None] = {}
    for pattern in itertools.chain.from_iterable(map(expand_braces, patterns)):
        path = f"{root.rstrip('/')}/{pattern}"
        if is_url(root):
            fs, inside = file_system(path)
            try:
                names = fs.glob(inside) if glob.has_magic(pattern) else [inside]
                matching = sorted(fs.unstrip_protocol(name) for name in names)
            except Exception as error:  # every storage raises its own types
                raise DataError(f"{path}: cannot list the shards ({error!r})") from error
        elif not glob.has_magic(pattern):
            matching = [path]
        else:
            matching = sorted(glob.glob(path))
        if not matching:
            raise DataError(f"{path}: no shard matches")
        paths |= dict.fromkeys(matching)
    return list(paths)


class Shards(ClassifiedImages):
    """Samples `<key>.<image>` with `<key>.cls`, or `<key>.json` with "label", in tars on this machine.

    Args:
        paths: The tars.
        classes: The class names, by label.
        decoding: The format to decode to.
        shown: Each tar's name for messages; default its path.

    Raises:
        DataError: A tar is missing or damaged, or a sample lacks image or label; the message names it.
    """

    labels_at_hand = False

    def __init__(
        self,
        paths: Sequence[str | Path],
        classes: list[str],
        decoding: Decoding = RGB,
        shown: Sequence[str] | None = None,
    ) -> None:
        index = index_tars(paths)
        self.classes, self.decoding = classes, decoding
        self._stored_classes = len(classes)
        self.shown = list(map(printable, shown or index.tars))
        self.reader = TarReader(index)
        self.image_members, self.label_members = _samples(index, self.shown, decoding)

    def __str__(self) -> str:
        return first_and_last(self.shown)

    def __len__(self) -> int:
        return len(self.image_members)

    def open(self, index: int) -> BytesIO:
        return BytesIO(self.reader.read(self.image_members[index]))

    def label(self, index: int) -> int:
        member = self.label_members[index]
        content: Any = self.reader.read(member)
        in_json = self.reader.index.names[member].lower().endswith(".json")
        try:
            label = json.loads(content)["label"] if in_json else int(content)
            if type(label) is int and 0 <= label < self._stored_classes:
                return label
        except (ValueError, TypeError, KeyError):
            label = content[:40].decode(errors="replace")
        raise DataError(
            f"{self.name(index)}: expected a label from 0 to {self._stored_classes - 1}, got {label!r}"
        )

    @cached_property
    def _labels(self) -> NDArray[np.int64]:
        return np.array([self.label(index) for index in range(len(self))], dtype=np.int64)

    def read_labels(self) -> NDArray[np.int64]:
        """Reads the file of each label, a few bytes, once."""
        return self._labels

    def name(self, index: int) -> str:
        member = self.image_members[index]
        return f"{self.shown[self.reader.index.tar[member]]}/{printable(self.reader.index.names[member])}"

    def key(self, index: int) -> str:
        member = self.image_members[index]
        tars = self.reader.index
        return f"{Path(tars.tars[tars.tar[member]]).name}/{tars.names[member]}"


def _samples(
    index: TarIndex, shown: Sequence[str], decoding: Decoding
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each sample, in the order of the tars, the members that hold its image and its label."""
    image, cls, description = range(3)
    columns = {suffix[1:]: image for suffix in image_suffixes()} | {"cls": cls, "json": description}
    if decoding.to_tensor:
        columns["npy"] = image
    samples: dict[tuple[int, str], list[int]] = {}
    for member, (tar, name) in enumerate(zip(index.tar.tolist(), index.names, strict=True)):
        folder, slash, file = name.rpartition("/")
        key, _, extension = file.partition(".")
        column = columns.get(extension.lower())
        if column is None or not key:
            continue
        members = samples.setdefault((tar, folder + slash + key), [-1, -1, -1])
        if members[column] >= 0:
            raise DataError(f"{shown[tar]}/{printable(name)}: a second image or label of the same sample")
        members[column] = member
    for (tar, key), members in samples.items():
        if members[image] < 0 or max(members[cls], members[description]) < 0:
            key = printable(key)
            raise DataError(
                f"{shown[tar]}: sample {key} has no {'image' if members[image] < 0 else 'label'}; expected "
                f"{key}.jpg (or another image) and {key}.cls or {key}.json"
            )
    if not samples:
        raise DataError(f"{first_and_last(shown)}: no samples; expected <key>.jpg and <key>.cls")
    table = np.array(list(samples.values()), dtype=np.int64)
    return table[:, image].copy(), np.where(table[:, cls] >= 0, table[:, cls], table[:, description])


def first_and_last(names: Sequence[str]) -> str:
    """Many file names, abbreviated to the first and the last."""
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


class WebDatasetSection(ClassificationSection):
    """Shards in a folder, or in object storage, from where they are fetched into `cache_dir`."""

    source: Literal["webdataset"] = "webdataset"
    root: str | None = Field(
        default=None, description="a folder, or an address such as s3://bucket/folder that fsspec knows"
    )
    train_split: str | list[str] = Field(  # type: ignore[assignment]
        default="train", description="patterns of shards, such as train-{000000..001023}.tar"
    )
    val_split: str | list[str] = "val"  # type: ignore[assignment]
    classes: str | int | None = Field(
        default=None, description="a text file with a name a line, or the number of classes"
    )
    shuffle_shards: int = Field(
        default=16, ge=1, description="shards in object storage whose samples an epoch mixes"
    )
    cache_dir: str | None = Field(
        default=None, description="folder for shards from object storage, on a local disk"
    )
    cache_gb: float = Field(default=100, gt=0, description="size in 10⁹ bytes that it is kept below")

    @model_validator(mode="after")
    def _complete(self) -> "WebDatasetSection":
        if self.classes is None:
            raise ValueError("classes: missing; a text file with a name a line, or the number of classes")
        if isinstance(self.classes, int) and self.classes < 1:
            raise ValueError(f"classes: expected at least 1, got {self.classes}")
        if self.root is not None and is_url(self.root):
            if self.cache_dir is None:
                raise ValueError(f"cache_dir: missing; shards from {self.root} are kept there")
            needs_labels = {
                "val_fraction": self.val_fraction is not None,
                "sampling": self.sampling == "balanced",
                "class_weights": self.class_weights == "balanced",
            }
            if name := next((name for name, set_ in needs_labels.items() if set_), None):
                raise ValueError(
                    f"{name}: needs all labels, which for shards in object storage means fetching them all; "
                    "copy them to a disk"
                )
        return self

    def open_split(self, split: Split, decoding: Decoding) -> ClassifiedImages:
        root, patterns = self._root(), self._split_name(split)
        shards = find_shards(root, [patterns] if isinstance(patterns, str) else patterns)
        assert self.classes is not None  # by the validator
        classes = read_classes(self.classes)
        if not is_url(root):
            return Shards(shards, classes, decoding)
        from vmamba.data.sources.remote import RemoteShards  # which reads what it fetched by `Shards`

        assert self.cache_dir is not None  # by the validator
        return RemoteShards(
            shards,
            classes,
            decoding,
            cache_dir=self.cache_dir,
            cache_gb=self.cache_gb,
            window=self.shuffle_shards,
        )
