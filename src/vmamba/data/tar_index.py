"""Random access to the files inside uncompressed tars, without unpacking.

Not `tarfile` alone, because that keeps a kilobyte of Python objects per file and mistakes a damaged header
for the end; and neither it nor fsspec's tar can be shared with forked workers.
"""

import os
import tarfile
import tempfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmamba.data.decoding import printable
from vmamba.data.strings import PackedStrings
from vmamba.errors import DataError
from vmamba.words import counted

CACHED_FROM = 100_000
"""Fewest files for which the index is cached beside the tars; with fewer it is rebuilt in seconds."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_OPEN_TARS = 128
_CACHE_FORMAT = 1


@dataclass(frozen=True)
class TarIndex:
    """Positions of the regular files in one or more tars, in the tars' order.

    Attributes:
        tars: The tars' paths.
        tar: For each file, the number of its tar.
        offsets: For each file, its first byte in the tar.
        sizes: For each file, its size in bytes.
        names: For each file, its path in the tar, without a leading "./".
        stamps: For each tar, its size in bytes and its modification time in ns: (tars, 2).
    """

    tars: Sequence[str]
    tar: NDArray[np.int32]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    names: PackedStrings
    stamps: NDArray[np.int64]


def index_tars(paths: Sequence[str | Path]) -> TarIndex:
    """Find the files in tars by reading their headers once; nothing is unpacked.

    The index of `CACHED_FROM` files or more is cached beside the first tar, if its folder is writable, and is
    valid as long as no tar's size or modification time changes.

    Raises:
        DataError: A tar is missing, compressed, cut short, damaged, or holds links or sparse files.
    """
    tars = [str(path) for path in paths]
    try:
        stamps = np.array([(s.st_size, s.st_mtime_ns) for s in map(os.stat, tars)], dtype=np.int64)
    except OSError as error:
        raise DataError(f"{printable(error.filename)}: cannot read the tar ({error.strerror})") from None
    first = Path(tars[0])
    others = f".{blake2b(repr(tars[1:]).encode(), digest_size=6).hexdigest()}" if len(tars) > 1 else ""
    cache = first.with_name(f".{first.name}{others}.index.npz")
    cached = _read_cache(cache, tars, stamps)
    if cached is not None:
        return cached
    rows: list[tuple[int, int, int]] = []
    names: list[str] = []
    for number, path in enumerate(tars):
        for name, offset, size in _members(path):
            rows.append((number, offset, size))
            names.append(name)
    table = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
    index = TarIndex(tars, table[0].astype(np.int32), table[1], table[2], PackedStrings.of(names), stamps)
    if len(names) >= CACHED_FROM:
        _write_cache(cache, index)
    return index


def _members(path: str) -> list[tuple[str, int, int]]:
    """Name, first byte and size of each regular file.

    `tarfile` mistakes a damaged header after the first for the end; here only the end-of-archive mark is one.

    Raises:
        DataError: See `index_tars`.
    """
    shown = printable(path)
    try:
        with open(path, "rb") as file:
            _refuse_compression(file.read(6), shown)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = _regular_files(tar, shown)
                end = tar.offset
            file.seek(end)
            mark = file.read(tarfile.BLOCKSIZE)
            if len(mark) < tarfile.BLOCKSIZE or any(mark):
                raise DataError(
                    f"{shown}: damaged or cut short at byte {end:,}, behind {counted(len(members), 'file')}"
                )
            while block := file.read(2**20):
                if any(block):
                    raise DataError(f"{shown}: goes on behind its end at byte {end:,}; were two tars joined?")
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{shown}: not a tar, or a damaged one ({error})") from error
    return members


def _refuse_compression(head: bytes, shown: str) -> None:
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(
                f"{shown}: compressed with {name}, which allows no random access; make it a plain tar"
            )


def _regular_files(tar: tarfile.TarFile, shown: str) -> list[tuple[str, int, int]]:
    files = []
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps a kilobyte per file
        if member.issym() or member.islnk() or member.issparse():
            raise DataError(
                f"{shown}: {printable(member.name)} is a link or a sparse file; make the tar anew with "
                "tar --dereference --hard-dereference"
            )
        if member.isreg():
            files.append((member.name.removeprefix("./"), member.offset_data, member.size))
    return files


def _read_cache(path: Path, tars: list[str], stamps: NDArray[np.int64]) -> TarIndex | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
            if int(saved["format"]) != _CACHE_FORMAT or not np.array_equal(saved["stamps"], stamps):
                return None
            names = PackedStrings(saved["text"], saved["ends"])
            return TarIndex(tars, saved["tar"], saved["offsets"], saved["sizes"], names, stamps)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # missing or damaged: the caller reads the headers again


def _write_cache(path: Path, index: TarIndex) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            try:
                np.savez(
                    file,
                    format=np.array(_CACHE_FORMAT),
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
        pass  # the folder is not writable, or the disk full: the next run reads the headers again


class TarReader:
    """Reads files of an index; it may be shared with other processes, forked or spawned.

    A descriptor opened before a fork works in the child too, since `pread` does not use the shared position.

    Args:
        index: The index of the tars.
    """

    def __init__(self, index: TarIndex) -> None:
        self.index = index
        self._open: OrderedDict[int, int] = OrderedDict()  # tar → descriptor, the most recently used last
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
            raise DataError(
                f"{printable(index.tars[tar])}: cannot read the tar ({error.strerror})"
            ) from error
        if len(content) < size:
            raise DataError(f"{self.name(number)}: the tar ends in it")
        return content

    def name(self, number: int) -> str:
        """The tar and the path in it, printable."""
        return printable(f"{self.index.tars[self.index.tar[number]]}/{self.index.names[number]}")

    def _descriptor(self, tar: int) -> int:
        if tar not in self._open:
            path = self.index.tars[tar]
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._open[tar] = descriptor
            if os.fstat(descriptor).st_size != self.index.stamps[tar, 0]:
                raise DataError(f"{printable(path)}: changed its size since it was indexed; start anew")
            if len(self._open) > _MAX_OPEN_TARS:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(tar)
        return self._open[tar]


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.read(descriptor, size)
