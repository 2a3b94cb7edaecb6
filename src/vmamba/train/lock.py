"""One run at a time in a folder."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vmamba.errors import OutputError, RecipeError

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs inside a `with` block.

    The operating system releases the lock when the process ends, however it ends; the file stays. The run's
    data workers do not hold it.

    Raises:
        RecipeError: Another process runs there.
        OutputError: The folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be the folder of a run ({error.strerror or error})") from error
    with file:
        if not _lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RecipeError(
                f"{folder}: {holder} is running in this folder; wait for it, stop it, or name another folder"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    """Try to take the lock; False if another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not flock: processes forked from this one, such as data workers, would hold that too.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
