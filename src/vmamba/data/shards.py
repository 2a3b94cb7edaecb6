"""WebDataset shards: tars of `<key>.jpg` with `<key>.cls`, on this machine or in object storage.

WebDataset itself reads them as streams, whose order depends on the workers and cannot be taken up again in
the middle. Here a shard is indexed, and its samples are read by number. What lies in object storage is
fetched shard by shard, and an epoch's order keeps the samples of some shards together (see `EpochSampler`).
"""

import glob
import itertools
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
from PIL import Image

from vmamba.data.classification import EXTENSIONS, ImageSource, read_image
from vmamba.data.loading import ShardError
from vmamba.data.sampling import Groups
from vmamba.data.tar import TarIndex, TarReader, index_tars
from vmamba.errors import DataError

SIZES = "sizes.json"
"""Beside shards: {"<shard>.tar": samples in it}."""

_WAITS = (1.0, 4.0)
"""Seconds before a download is tried again."""
_FORGET = 300.0
"""Seconds after which a shard that could not be read is tried again."""

log = logging.getLogger(__name__)


def is_url(root: str) -> bool:
    return "://" in root


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
            fs, inside = _file_system(path)
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
        return _between(self.called)

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
        raise DataError(f"{_between(called)}: no samples; expected <key>.jpg and <key>.cls")
    table = np.array(list(found.values()), dtype=np.int64)
    return table[:, 0].copy(), np.where(table[:, 1] >= 0, table[:, 1], table[:, 2])


def _between(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


class RemoteShards(ImageSource):
    """Such samples in object storage: a shard is fetched whole into a folder when one of its samples is read.

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
        return _between(self.urls)

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
                _download(url, path)
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
        fs, inside = _file_system(url)
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


def _file_system(url: str) -> tuple[Any, str]:
    """Anew in each call: a file system that was made before a fork does not work behind it."""
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{url}: {error}; to read object storage: pip install 'vmamba[data]'") from error
    except ValueError as error:
        raise DataError(f"{url}: no address that fsspec knows ({error})") from error


def read_sizes(url: str) -> dict[str, int]:
    """A `sizes.json`; empty if there is none.

    Raises:
        DataError: It cannot be read, or is something else.
    """
    try:
        if is_url(url):
            fs, inside = _file_system(url)
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


def _download(url: str, path: Path) -> None:
    """All of it, or nothing at `path`; only one process at a time."""
    part = path.with_name(f"{path.name}.part")
    for wait in (*_WAITS, None):
        try:
            fs, inside = _file_system(url)
            expected = fs.info(inside)["size"]
            fs.get_file(inside, str(part))
            size = part.stat().st_size
            if expected is not None and size != expected:
                raise OSError(f"{size} of {expected} bytes came")
            os.replace(part, path)
            return
        except DataError:
            raise
        except Exception as error:  # every storage raises its own
            part.unlink(missing_ok=True)
            if wait is None or isinstance(error, FileNotFoundError):
                raise DataError(f"{url}: cannot fetch the shard ({error!r})") from error
            time.sleep(wait)
