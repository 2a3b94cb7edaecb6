"""Write files and figures atomically, lock them, and compute their SHA-256."""

import errno
import hashlib
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO, Any


def sha256(path: str | PathLike[str]) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[Path]:
    """Write a file that replaces `path` only once it is complete and on disk.

    A device or a pipe (`/dev/stdout`) is written to directly, because a rename would replace it by a file.

    Args:
        path: The file to write; missing parent folders are created.

    Yields:
        The temporary path to write to, in the same folder. It is removed if the block fails.

    Raises:
        OSError: The file cannot be written; what `path` held before is intact.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not derived from the file's name, which may be as long as the file system allows.
    temporary = path.parent / f".vmamba-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_atomically(path: str | PathLike[str], text: str) -> None:
    """Write a text file, in UTF-8 and with its line ends as they are, through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def try_lock(file: IO[str]) -> bool:
    """Lock an open, writable file against other processes; False if one of them has it.

    The operating system releases the lock when the file is closed or the process ends, however it ends.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not flock: processes forked from this one, such as data workers, would hold that too.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_figure(figure: Any, path: str | PathLike[str], dpi: int) -> None:
    """Write a matplotlib figure through `replacing`, in the format of the path's suffix, PNG without one."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:] or "png", dpi=dpi)
