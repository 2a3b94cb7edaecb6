"""Pack an image folder into one tar or into WebDataset shards; the same input gives the same bytes."""

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import torch

from vmamba.data.decoding import printable
from vmamba.data.seeding import draw_seed
from vmamba.data.sources.folder import ImageFolder
from vmamba.data.sources.remote import SIZES, read_sizes
from vmamba.errors import DataError
from vmamba.files import replacing, write_atomically


def write_tar(folder: str | Path, path: str | Path) -> int:
    """Pack `folder/<class>/…/<image>` for `TarImages`.

    Returns:
        The number of images in it.

    Raises:
        DataError: The folder is not an image folder, or the tar cannot be written; no `path` is left then.
    """
    source = ImageFolder(folder)
    with _writing(Path(path)) as tar:
        for index, path in enumerate(source.paths):
            _add(tar, path, source.path(index).read_bytes())
    return len(source)


def write_shards(
    folder: str | Path, out: str | Path, split: str = "train", samples: int = 1000, seed: int = 0
) -> int:
    """Pack an image folder into `out/<split>-000000.tar` …, shuffled, with `sizes.json` and `classes.txt`.

    Shuffled, because training mixes samples within a few shards at a time, so each should hold all classes.

    Args:
        folder: `folder/<class>/…/<image>`.
        out: A folder. Its `sizes.json` keeps the entries of other splits; `classes.txt` has a name per line.
        split: Prefix of the shards' names.
        samples: Samples in each shard but the last.
        seed: Seed of the order.

    Returns:
        The number of shards.

    Raises:
        DataError: The folder is not an image folder, another split has other classes, or a file cannot be
            written.
    """
    source, out = ImageFolder(folder), Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{name}\n" for name in source.classes)
        classes = out / "classes.txt"
        if classes.exists() and classes.read_text(encoding="utf-8") != names:
            raise DataError(f"{classes}: holds other classes than {folder}")
        sizes = read_sizes(str(out / SIZES))
        generator = torch.Generator().manual_seed(draw_seed("shards", seed))
        order = torch.randperm(len(source), generator=generator).split(samples)
        for number, indices in enumerate(order):
            name = f"{split}-{number:06}.tar"
            with _writing(out / name) as tar:
                for index in indices.tolist():
                    file = source.path(index)
                    _add(tar, f"{index:08}{file.suffix.lower()}", file.read_bytes())
                    _add(tar, f"{index:08}.cls", str(source.label(index)).encode())
            sizes[name] = len(indices)
        write_atomically(classes, names)
        write_atomically(out / SIZES, json.dumps(sizes, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot write the shards ({error.strerror})") from error
    return len(order)


@contextmanager
def _writing(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            yield tar
    except OSError as error:
        raise DataError(
            f"{printable(error.filename or path)}: cannot write {path} ({error.strerror})"
        ) from error


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))
