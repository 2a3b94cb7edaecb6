"""One run at a time in a folder."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmamba.errors import OutputError, RecipeError
from vmamba.files import try_lock

NAME = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other runs inside a `with` block.

    The operating system releases the lock when the process ends, however it ends; the file stays. The run's
    data workers do not hold it.

    Raises:
        RecipeError: Another process runs there.
        OutputError: The folder cannot be made, written to or locked.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / NAME).open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be the folder of a run ({error.strerror or error})") from error
    with file:
        try:
            is_ours = try_lock(file)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be locked ({error.strerror or error})") from error
        if not is_ours:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RecipeError(
                f"{folder}: {holder} is running in this folder; wait for it, stop it, or name another folder"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
