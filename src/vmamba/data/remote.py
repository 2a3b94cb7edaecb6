"""WebDataset shards in object storage, fetched one by one into a folder.

An epoch's order keeps the samples of some shards together (see `EpochSampler`): few are needed at once.
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
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vmamba.data.classification import ImageSource
from vmamba.data.loading import ShardError
from vmamba.data.sampling import Groups
from vmamba.data.shards import Shards, between
from vmamba.data.storage import download, file_system, is_url
from vmamba.errors import DataError

SIZES = "sizes.json"
"""Beside shards: {"<shard>.tar": samples in it}."""

_FORGET = 300.0
"""Seconds after which a shard that could not be read is tried again."""

log = logging.getLogger(__name__)


class RemoteShards(ImageSource):
    """`Shards` in object storage: a shard is fetched whole into a folder when one of its samples is read.

    The folder serves any number of processes at once, and the following runs. An address is held to keep its
    content. How many samples a shard holds is read from `sizes.json` beside it; without one every shard has
    to be fetched once before the first epoch.

    Args:
        urls: Addresses that fsspec knows, of one file system.
        classes: Their names, by label.
        mode: "RGB" or "L".
        cache_dir: The folder, on a local disk.
        cache_gb: Size that it is kept below, in 10⁹ bytes, by removing what was not opened for longest.
        window: Shards whose samples an epoch mixes.

    Raises:
        DataError: The storage does not answer, the folder cannot be written to, or `window` shards do not
            fit into it.
    """

    groups: Groups

    def __init__(
        self,
        urls: Sequence[str],
        classes: list[str],
        mode: str = "RGB",
        *,
        cache_dir: str | Path,
        cache_gb: float = 100,
        window: int = 16,
    ) -> None:
        self.urls, self.classes, self.mode = list(urls), classes, mode
        self.folder, self.limit, self.window = Path(cache_dir), cache_gb * 1e9, window
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder}: cannot make the folder for shards ({error.strerror})") from None
        self._open: OrderedDict[int, Shards] = OrderedDict()  # the latest used last
        self._failed: dict[int, tuple[float, str]] = {}
        largest = self._size(self.urls[0])
        if largest is not None and largest * min(window, len(urls)) > self.limit:
            raise DataError(
                f"{self.folder}: {min(window, len(urls))} shards of {largest / 1e9:.3g} GB, which are read "
                f"at once, do not fit in {cache_gb:g} GB; raise data.cache_gb or lower data.shuffle_shards"
            )
        sizes = self._sizes()
        self.ends = np.cumsum(sizes)
        self.groups = Groups(sizes, window)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __str__(self) -> str:
        return between(self.urls)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return shard, index - int(self.ends[shard]) + self.groups.sizes[shard]

    def name(self, index: int) -> str:
        shard, inside = self._place(index)
        return f"{self.urls[shard]}: sample {inside}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        shard, inside = self._place(index)
        try:
            source = self._shard(shard)
        except DataError as error:
            raise ShardError(f"{self.name(index)}: {error}", self.groups.sizes[shard]) from error
        return source.load(inside)

    def _shard(self, shard: int) -> Shards:
        if shard not in self._open:
            when, why = self._failed.get(shard, (-_FORGET, ""))
            if time.monotonic() - when < _FORGET:
                raise DataError(why)
            try:
                with self._fetched(self.urls[shard]) as source:
                    if len(source) != self.groups.sizes[shard]:
                        raise DataError(
                            f"the shard holds {len(source)} samples, and {self.groups.sizes[shard]} by the "
                            f"list of sizes; mend {SIZES} beside it, or remove those in {self.folder}"
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
        """A shard, open, so that it may be removed from the folder while it is read."""
        path = self.folder / f"{_digest(url)}-{url.rpartition('/')[2]}"
        with self._lock(path):
            if path.exists():
                os.utime(path)
            else:
                download(url, path)
                self._evict(path)
            try:
                source = Shards([path], self.classes, self.mode, [url])
                source.reader.read(source.labels[0])
            except DataError:
                path.unlink(missing_ok=True)  # what is mended at its address is fetched anew
                raise
            yield source

    def _lock(self, path: Path, **kwargs: Any) -> Any:
        """Of one file among all processes; the system gives it back if one dies."""
        from filelock import FileLock

        return FileLock(f"{path}.lock", **kwargs)

    def _evict(self, newest: Path) -> None:
        from filelock import Timeout

        found = []
        for path in self.folder.iterdir():
            if re.match(r"[0-9a-f]{16}-.*(?<!\.lock)$", path.name):
                with suppress(FileNotFoundError):  # another process removed it
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit or path == newest:
                break
            shard = path.with_name(path.name.removesuffix(".part"))  # one that is being fetched is locked
            with suppress(Timeout, OSError), self._lock(shard, blocking=False):
                path.unlink(missing_ok=True)
                total -= size

    def _size(self, url: str) -> int | None:
        fs, inside = file_system(url)
        try:
            return fs.info(inside)["size"]
        except Exception as error:  # every storage raises its own
            raise DataError(f"{url}: cannot read the shard ({error!r})") from error

    def _sizes(self) -> list[int]:
        """Samples of each shard: listed beside them, found by an earlier run, or counted now."""
        known: dict[str, int] = {}
        for folder in dict.fromkeys(url.rpartition("/")[0] for url in self.urls):
            for name, number in read_sizes(f"{folder}/{SIZES}").items():
                known[f"{folder}/{name}"] = number
        counted = self.folder / f"{_digest(*self.urls)}.{SIZES}"
        if any(url not in known for url in self.urls):
            with self._lock(counted):
                known |= read_sizes(str(counted))
                missing = [url for url in self.urls if url not in known]
                if missing:
                    log.warning(
                        "fetching %d shards to count their samples: no %s beside them", len(missing), SIZES
                    )
                for url in missing:
                    with self._fetched(url) as source:
                        known[url] = len(source)
                part = counted.with_suffix(".part")
                part.write_text(json.dumps(known), encoding="utf-8")
                os.replace(part, counted)
        return [known[url] for url in self.urls]


def _digest(*urls: str) -> str:
    return blake2b(repr(urls).encode(), digest_size=8).hexdigest()


def read_sizes(url: str) -> dict[str, int]:
    """A `sizes.json`; empty if there is none.

    Raises:
        DataError: It cannot be read, or is something else.
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
    except Exception as error:  # every storage raises its own
        raise DataError(f"{url}: cannot be read ({error!r})") from error
    if not isinstance(sizes, dict) or not all(type(size) is int and size > 0 for size in sizes.values()):
        raise DataError(f'{url}: expected {{"<shard>.tar": samples, …}}')
    return sizes
