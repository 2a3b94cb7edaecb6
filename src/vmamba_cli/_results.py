"""The folder for results, checked before the work and written after it."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vmamba_cli._extra import load
from vmamba_cli._messages import refuse

RESULTS = "results.json"


def check_folder(folder: Path, *pictures: str, results: str = RESULTS) -> None:
    """Check that a folder for results, and its files, can be written; leave nothing behind.

    Args:
        folder: The folder; what is written later creates it if it is missing.
        pictures: Names of pictures that will be written beside the results.
        results: Name of the file of results.

    Raises:
        typer.Exit: It cannot be written to, or pictures cannot be drawn; the reason was printed.
    """
    with _reported(folder):
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        finally:
            for each in missing:
                with suppress(OSError):  # it was not made, or is no longer empty
                    each.rmdir()
    for name in (results, *pictures):
        if (folder / name).is_dir():
            refuse(f"--out: {folder / name} is a folder; a file of that name is to be written")
    if pictures:
        load("matplotlib", "train")


def write(folder: Path, rows: Sequence[dict[str, Any]], name: str = RESULTS) -> Path:
    """Write results, with the hardware and software used, to a checked folder; returns the file's path.

    The file is written whole or not at all.

    Raises:
        typer.Exit: It cannot be written; the reason was printed.
    """
    from vmamba.environment import environment
    from vmamba.files import write_atomically

    path = folder / name
    text = json.dumps({"environment": environment(), "results": list(rows)}, indent=2) + "\n"
    with _reported(path):
        write_atomically(path, text)
    return path


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one line and exit status 2."""
    try:
        yield
    except OSError as error:
        refuse(f"--out: cannot write to {path}: {error.strerror or error}")
