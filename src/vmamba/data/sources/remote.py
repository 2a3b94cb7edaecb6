"""WebDataset shards in object storage, fetched one by one into a folder.

An epoch's order keeps the samples of some shards together (see `EpochSampler`), so few shards are needed at
once. fsspec accesses the storage. The cache folder is our own, because fsspec's caches have no limit of their
size and are not safe for several processes that add and remove files.
"""

import json
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmamba.data.decoding import RGB, DecodedImage, Decoding
from vmamba.data.loading import ShardError
from vmamba.data.sampling import SampleGroups
from vmamba.data.source import ClassifiedImages
from vmamba.data.sources.webdataset import Shards, first_and_last
from vmamba.data.storage import download, file_system, is_url
from vmamba.errors import DataError
from vmamba.files import write_atomically
from vmamba.words import counted

SIZES = "sizes.json"
"""The file beside the shards with their numbers of samples: {"<shard>.tar": 1000, …}."""

_RETRY_AFTER = 300.0
"""Seconds after which a shard that could not be read is tried again."""

log = logging.getLogger(__name__)


class RemoteShards(ClassifiedImages):
    """`Shards` in object storage: a shard is fetched whole into a folder when one of its samples is read.

    Any number of processes, and later runs, can share the folder. The content of an address is assumed not to
    change. How many samples a shard holds is read from `sizes.json` beside it; without one every shard is
    fetched once before the first epoch.

    Args:
        urls: Addresses on one file system that fsspec supports.
        classes: The class names, by label.
        decoding: The format to decode to.
        cache_dir: The folder, on a local disk.
        cache_gb: Most size of the folder, in 10⁹ bytes; the least recently opened shards are removed first.
        window: How many shards an epoch shuffles together.

    Raises:
        DataError: The storage does not answer, the folder cannot be written to, or `window` shards are larger
            than `cache_gb`.
    """

    groups: SampleGroups
    labels_at_hand = False

    def __init__(
        self,
        urls: Sequence[str],
        classes: list[str],
        decoding: Decoding = RGB,
        *,
        cache_dir: str | Path,
        cache_gb: float = 100,
        window: int = 16,
    ) -> None:
        self.urls, self.classes, self.decoding = list(urls), classes, decoding
        self._stored_classes = list(classes)
        self.folder, self.limit, self.window = Path(cache_dir), cache_gb * 1e9, window
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot make the folder for shards ({error.strerror})") from None
        self._open: OrderedDict[int, Shards] = OrderedDict()  # the most recently used last
        self._failed: dict[int, tuple[float, str]] = {}
        largest = self._size(self.urls[0])
        if largest is not None and largest * min(window, len(urls)) > self.limit:
            raise DataError(
                f"{self.folder}: {min(window, len(urls))} shards of {largest / 1e9:.3g} GB, which are read "
                f"at once, do not fit in {cache_gb:g} GB; raise data.cache_gb or lower data.shuffle_shards"
            )
        sizes = self._sizes()
        self.ends = np.cumsum(sizes)
        self.groups = SampleGroups(sizes, window)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __str__(self) -> str:
        return first_and_last(self.urls)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - int(self.ends[shard]) + self.groups.sizes[shard]

    def name(self, index: int) -> str:
        shard, inside = self._place(index)
        return f"{self.urls[shard]}: sample {inside}"

    def key(self, index: int) -> str:
        shard, inside = self._place(index)
        return f"{self.urls[shard].rpartition('/')[2]}/{inside}"

    def open(self, index: int) -> BytesIO:
        source, inside = self._shard_of(index)
        return source.open(inside)

    def image(self, index: int) -> DecodedImage:
        source, inside = self._shard_of(index)
        return source.image(inside)

    def label(self, index: int) -> int:
        source, inside = self._shard_of(index)
        return source.label(inside)

    def read_labels(self) -> NDArray[np.int64]:
        raise DataError(f"{self}: the labels of shards in object storage are not there before the shards are")

    def use_classes(self, classes: Sequence[str], whose: str = "the model") -> None:
        """Accepts only the classes of `data.classes`: no label can be checked before its shard is fetched."""
        if list(classes) != self.classes:
            raise DataError(f"{self}: data.classes names other classes than {whose} has, or in another order")

    def _shard_of(self, index: int) -> tuple[Shards, int]:
        """The opened shard of a sample, and the sample's index in it."""
        shard, inside = self._place(index)
        try:
            return self._shard(shard), inside
        except DataError as error:
            raise ShardError(f"{self.name(index)}: {error}", self.groups.sizes[shard]) from error

    def _shard(self, shard: int) -> Shards:
        if shard not in self._open:
            when, why = self._failed.get(shard, (-_RETRY_AFTER, ""))
            if time.monotonic() - when < _RETRY_AFTER:
                raise DataError(why)
            try:
                with self._fetched(self.urls[shard]) as source:
                    if len(source) != self.groups.sizes[shard]:
                        raise DataError(
                            f"the shard holds {counted(len(source), 'sample')}, and "
                            f"{self.groups.sizes[shard]} by the list of sizes; mend {SIZES} beside it, or "
                            f"remove those in {self.folder}"
                        )
                    self._open[shard] = source
            except DataError as error:
                self._failed[shard] = (time.monotonic(), str(error))
                raise
            if len(self._open) > self.window + 1:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    @contextmanager
    def _fetched(self, url: str) -> Iterator[Shards]:
        """A fetched and opened shard: another process may remove its file while it is read."""
        path = self.folder / f"{_digest(url)}-{url.rpartition('/')[2]}"
        with self._lock(path):
            if path.exists():
                os.utime(path)
            else:
                download(url, path)
                self._evict(path)
            try:
                source = Shards([path], self._stored_classes, self.decoding, [url])
                source.reader.read(source.label_members[0])
            except DataError:
                path.unlink(missing_ok=True)  # so that a shard repaired at its address is fetched again
                raise
            yield source

    def _lock(self, path: Path, **kwargs: Any) -> Any:
        """A lock on one file, among all processes; the system releases it if its holder dies."""
        from filelock import FileLock

        return FileLock(f"{path}.lock", **kwargs)

    def _evict(self, newest: Path) -> None:
        """Remove the least recently opened shards until the folder is within `cache_gb`."""
        from filelock import Timeout

        shards = []
        for path in self.folder.iterdir():
            if re.match(r"[0-9a-f]{16}-.*(?<!\.lock)$", path.name):
                with suppress(FileNotFoundError):  # another process removed it
                    status = path.stat()
                    shards.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in shards)
        for _, size, path in sorted(shards):
            if total <= self.limit or path == newest:
                break
            shard = path.with_name(path.name.removesuffix(".part"))  # a shard that is being fetched is locked
            with suppress(Timeout, OSError), self._lock(shard, blocking=False):
                path.unlink(missing_ok=True)
                total -= size

    def _size(self, url: str) -> int | None:
        fs, inside = file_system(url)
        try:
            return fs.info(inside)["size"]
        except Exception as error:  # every storage raises its own types
            raise DataError(f"{url}: cannot read the shard ({error!r})") from error

    def _sizes(self) -> list[int]:
        """Samples of each shard: from `sizes.json`, counted by an earlier run, or counted now."""
        samples: dict[str, int] = {}
        for folder in dict.fromkeys(url.rpartition("/")[0] for url in self.urls):
            for name, number in read_sizes(f"{folder}/{SIZES}").items():
                samples[f"{folder}/{name}"] = number
        if any(url not in samples for url in self.urls):
            samples |= self._count(samples)
        return [samples[url] for url in self.urls]

    def _count(self, listed: dict[str, int]) -> dict[str, int]:
        """Count the samples of shards that `sizes.json` does not list; the folder keeps the counts."""
        file = self.folder / f"{_digest(*self.urls)}.{SIZES}"
        with self._lock(file):
            samples = read_sizes(str(file))
            missing = [url for url in self.urls if url not in listed and url not in samples]
            if missing:
                log.warning(
                    "fetching %s to count the samples: no %s there", counted(len(missing), "shard"), SIZES
                )
            for url in missing:
                with self._fetched(url) as source:
                    samples[url] = len(source)
            write_atomically(file, json.dumps(samples))
        return samples


def _digest(*urls: str) -> str:
    return blake2b(repr(urls).encode(), digest_size=8).hexdigest()


def read_sizes(url: str) -> dict[str, int]:
    """Read a `sizes.json`; empty if there is none.

    Raises:
        DataError: It cannot be read, or has another format.
    """
    try:
        if is_url(url):
            fs, inside = file_system(url)
            sizes = json.loads(fs.cat_file(inside))
        else:
            sizes = json.loads(Path(url).read_bytes())
    except FileNotFoundError:
        return {}
    except DataError:
        raise
    except Exception as error:  # every storage raises its own types
        raise DataError(f"{url}: cannot be read ({error!r})") from error
    if not isinstance(sizes, dict) or not all(type(size) is int and size > 0 for size in sizes.values()):
        raise DataError(f'{url}: expected {{"<shard>.tar": samples, …}}')
    return sizes
