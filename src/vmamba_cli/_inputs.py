"""The images that a command is given: files, folders and globs."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from vmamba_cli._messages import refuse, say


def require_images(images: Iterable[str]) -> None:
    """Stop with a message if there is nothing at a path; before PyTorch is imported, which takes seconds.

    Args:
        images: Files, folders and globs, as the user gave them.

    Raises:
        typer.Exit: It was printed which is missing.
    """
    for image in images:
        if not os.path.lexists(os.path.expanduser(image)) and not any(char in image for char in "*?["):
            refuse(f"{image}: no such image or folder")


def find_images(images: Iterable[str]) -> Iterator[Any]:
    """The files named, as `Input`s; from folders and globs those that are not hidden, sorted by name.

    Args:
        images: Files, folders and globs.

    Raises:
        DataError: A folder has no images, or no file a name like that.
    """
    import glob

    from vmamba.errors import DataError
    from vmamba_cli._predictions import Input

    for image in images:
        path = os.path.expanduser(image)
        if os.path.isdir(path):
            yield from _in_folder(path)
        elif os.path.lexists(path):
            yield Input(path, os.path.basename(path))
        else:
            matches = sorted(glob.glob(path, recursive=True))
            files = [match for match in matches if not os.path.isdir(match)]
            if not files:
                raise DataError(f"{image}: no file has such a name")
            above = os.path.commonpath([os.path.dirname(file) for file in files])
            for file in files:
                yield Input(file, os.path.relpath(file, above or "."))


def _in_folder(folder: str) -> Iterator[Any]:
    from vmamba.data.finding import LeftOut, find_images
    from vmamba.errors import DataError
    from vmamba_cli._predictions import Input

    left_out = LeftOut()
    names = find_images(folder, left_out)
    if not names:
        raise DataError(
            f"{folder}: no images in this folder or below{f'; {left_out}' if str(left_out) else ''}"
        )
    if str(left_out):
        say(f"{folder}: left out {left_out}")
    for name in names:
        yield Input(os.path.join(folder, name), name)
