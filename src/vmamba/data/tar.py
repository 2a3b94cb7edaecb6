"""Images inside uncompressed tars, read at random where they lie."""

import os
import tarfile
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vmamba.data.classification import EXTENSIONS, ImageSource, read_image
from vmamba.errors import DataError

CACHED_FROM = 100_000
"""Files from which on an index is kept beside its tars: that of fewer is read anew in seconds."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_OPEN_AT_ONCE = 128
_FORMAT = 1


class Names(Sequence[str]):
    """Strings in one block of bytes: a million of them are two arrays, which forked workers share.

    Args:
        text: All of them in UTF-8, one behind the other.
        ends: Where each ends, in bytes.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> "Names":
        encoded = [os.fsencode(name) for name in names]
        return cls(
            np.frombuffer(b"".join(encoded), np.uint8),
            np.cumsum([len(name) for name in encoded], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.text[start : self.ends[index]].tobytes())


@dataclass(frozen=True)
class TarIndex:
    """Where the regular files in one or more tars lie, in the order of the tars and in them.

    Attributes:
        tars: Their paths.
        tar: Of each file, the number of its tar.
        offsets: Of each file, its first byte in the tar.
        sizes: Of each file, in bytes.
        names: Of each file, its path in the tar, without a leading "./".
        stamps: Of each tar, its size in bytes and its time of change in ns: (tars, 2).
    """

    tars: Sequence[str]
    tar: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: Names
    stamps: NDArray[np.int64]


def index_tars(paths: Sequence[str | Path]) -> TarIndex:
    """Find the files in tars by reading their headers once; nothing is unpacked.

    The index of `CACHED_FROM` files or more is kept beside the first tar, where its folder can be written to,
    and is valid as long as no tar changes its size or time.

    Raises:
        DataError: A tar is missing, compressed, cut short, damaged, or holds links or sparse files.
    """
    tars = [str(path) for path in paths]
    try:
        stamps = np.array([(s.st_size, s.st_mtime_ns) for s in map(os.stat, tars)], dtype=np.int64)
    except OSError as error:
        raise DataError(f"{error.filename}: cannot read the tar ({error.strerror})") from None
    first = Path(tars[0])
    others = f".{blake2b(repr(tars[1:]).encode(), digest_size=6).hexdigest()}" if len(tars) > 1 else ""
    cache = first.with_name(f".{first.name}{others}.index.npz")
    found = _read_cache(cache, tars, stamps)
    if found is not None:
        return found
    rows: list[tuple[int, int, int]] = []
    names: list[str] = []
    for number, path in enumerate(tars):
        for name, offset, size in _members(path):
            rows.append((number, offset, size))
            names.append(name)
    table = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
    found = TarIndex(tars, table[0].astype(np.int32), table[1], table[2], Names.of(names), stamps)
    if len(names) >= CACHED_FROM:
        _write_cache(cache, found)
    return found


def _members(path: str) -> list[tuple[str, int, int]]:
    """Name, first byte and size of each regular file.

    `tarfile` takes a damaged header behind the first for the end; here only the mark of the end is one.
    """
    found = []
    try:
        with open(path, "rb") as file:
            head = file.read(6)
            for magic, name in _COMPRESSED.items():
                if head.startswith(magic):
                    raise DataError(
                        f"{path}: compressed with {name}, which allows no random access; make it a plain tar"
                    )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # else it keeps a kilobyte a file
                    if member.issym() or member.islnk() or member.issparse():
                        raise DataError(
                            f"{path}: {member.name} is a link or a sparse file; make the tar anew with "
                            "tar --dereference --hard-dereference"
                        )
                    if member.isreg():
                        found.append((member.name.removeprefix("./"), member.offset_data, member.size))
                end = tar.offset
            file.seek(end)
            mark = file.read(tarfile.BLOCKSIZE)
            if len(mark) < tarfile.BLOCKSIZE or any(mark):
                raise DataError(f"{path}: damaged or cut short at byte {end:,}, behind {len(found):,} files")
            while block := file.read(2**20):
                if any(block):
                    raise DataError(f"{path}: goes on behind its end at byte {end:,}; were two tars joined?")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path}: not a tar, or a damaged one ({error})") from error
    return found


def _read_cache(path: Path, tars: list[str], stamps: NDArray[np.int64]) -> TarIndex | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
            if int(saved["format"]) != _FORMAT or not np.array_equal(saved["stamps"], stamps):
                return None
            return TarIndex(
                *(tars, saved["tar"], saved["offsets"], saved["sizes"]),
                *(Names(saved["text"], saved["ends"]), stamps),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # there is none, or a damaged one: it is made anew


def _write_cache(path: Path, index: TarIndex) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                np.savez(
                    file,
                    format=np.array(_FORMAT),
                    stamps=index.stamps,
                    tar=index.tar,
                    offsets=index.offsets,
                    sizes=index.sizes,
                    text=index.names.text,
                    ends=index.names.ends,
                )
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError:
        pass  # the folder cannot be written to, or is full: the next run reads the headers again


class TarReader:
    """Reads files of an index; it may be copied to other processes, forked or spawned.

    A descriptor that was open before a fork serves the child too, since a read at an offset moves nothing.

    Args:
        index: Of the tars.
    """

    def __init__(self, index: TarIndex) -> None:
        self.index = index
        self._open: OrderedDict[int, int] = OrderedDict()  # tar → descriptor, the latest used last
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["index"])  # type: ignore[misc]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, number: int) -> bytes:
        """The content of a file.

        Raises:
            DataError: The tar cannot be read, or changed since it was indexed.
        """
        index = self.index
        tar, offset, size = int(index.tar[number]), int(index.offsets[number]), int(index.sizes[number])
        try:
            with self._lock:
                content = _read_at(self._descriptor(tar), size, offset)
        except OSError as error:
            raise DataError(f"{index.tars[tar]}: cannot read the tar ({error.strerror})") from error
        if len(content) < size:
            raise DataError(f"{self.name(number)}: the tar ends in it")
        return content

    def name(self, number: int) -> str:
        """Tar and path in it."""
        return f"{self.index.tars[self.index.tar[number]]}/{self.index.names[number]}"

    def _descriptor(self, tar: int) -> int:
        if tar not in self._open:
            path = self.index.tars[tar]
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._open[tar] = descriptor
            if os.fstat(descriptor).st_size != self.index.stamps[tar, 0]:
                raise DataError(f"{path}: changed its size since it was indexed; start anew")
            if len(self._open) > _OPEN_AT_ONCE:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(tar)
        return self._open[tar]


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)


def _is_image(name: str) -> bool:
    file = name.rpartition("/")[2]
    return file[:1] != "." and os.path.splitext(file)[1].lower() in EXTENSIONS


class TarImages(ImageSource):
    """An image folder in one uncompressed tar: `[folders/]<class>/…/<image>`.

    Folders that all images have in common, such as one for the split, are left out; the next one names the
    class. Classes and images have the order that `ImageFolder` gives them when the tar is unpacked, so that a
    run sees the same from both.

    Args:
        path: The tar.
        mode: "RGB" or "L".

    Raises:
        DataError: The tar is missing, compressed, damaged or without images in class folders.
    """

    def __init__(self, path: str | Path, mode: str = "RGB") -> None:
        self.path, self.mode = str(path), mode
        index = index_tars([path])
        found: list[tuple[bytes, int]] = []  # sorted by folder, not by character: "/" before all others
        for number, name in enumerate(index.names):
            if _is_image(name):
                found.append((os.fsencode(name).replace(b"/", b"\0"), number))
        found.sort()
        if not found:
            raise DataError(f"{path}: no images in it; expected {', '.join(sorted(EXTENSIONS))}")
        first, last = (found[i][0].split(b"\0")[:-1] for i in (0, -1))
        same = [a == b for a, b in zip(first, last, strict=False)]
        common = [*same, False].index(False)
        depth = min(common, max(0, len(first) - 1))  # of one class alone
        classes: list[str] = []
        labels, numbers = [], []
        for key, number in found:
            folder, _, inside = key.split(b"\0", depth)[-1].partition(b"\0")
            if not inside:
                raise DataError(f"{path}: {index.names[number]} lies in no class folder")
            name = os.fsdecode(folder)
            if name[0] == ".":
                continue
            if not classes or classes[-1] != name:
                classes.append(name)
            labels.append(len(classes) - 1)
            numbers.append(number)
        self.classes = classes
        self.labels = np.array(labels, dtype=np.int32)
        self.numbers = np.array(numbers, dtype=np.int64)
        self.reader = TarReader(index)

    def __str__(self) -> str:
        return self.path

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        number = self.numbers[index]
        content = BytesIO(self.reader.read(number))
        return read_image(content, self.mode, self.name(index)), int(self.labels[index])

    def name(self, index: int) -> str:
        return self.reader.name(self.numbers[index])
