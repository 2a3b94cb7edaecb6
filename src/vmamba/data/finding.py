"""Find the samples among the files of a folder or tar, and count the files left out."""

import logging
import os
import stat
from collections import Counter
from collections.abc import Iterator

from vmamba.data.decoding import RGB, Decoding, is_image_name, printable
from vmamba.errors import DataError

log = logging.getLogger(__name__)


class LeftOut:
    """Counts the files left out of a dataset, by reason."""

    HIDDEN = "hidden files or folders"
    NO_IMAGE = "files that are no images by their suffix"
    SPECIAL = "entries that are no regular files"
    LINKS_BACK = "links to folders that are read already"
    OUTSIDE = "files outside of class folders"

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.suffixes: Counter[str] = Counter()

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        if reason == self.NO_IMAGE:
            self.suffixes[printable(os.path.splitext(name)[1].lower() or "no suffix")] += 1

    def __str__(self) -> str:
        reasons = []
        for reason, count in self.counts.items():
            shown = ""
            if reason == self.NO_IMAGE:
                shown = ": " + ", ".join(suffix for suffix, _ in self.suffixes.most_common(5))
            reasons.append(f"{reason} ({count:,}{shown})")
        return ", ".join(reasons)

    def report(self, source: str) -> None:
        """One line in the log, if anything was left out."""
        if self.counts:
            log.warning("%s: left out %s", source, self)


def is_hidden(name: str) -> bool:
    return name.startswith(".")


def sort_key(name: str) -> bytes:
    """Orders paths folder by folder and byte by byte: "/" comes before all other characters."""
    return os.fsencode(name).replace(b"/", b"\0")


def find_images(folder: str, left_out: LeftOut, decoding: Decoding = RGB) -> list[str]:
    """Paths of the images below a folder, relative to it and with "/", in the order of `sort_key`.

    Hidden entries are left out. Links to files and folders are followed, but no folder is read twice, so that
    a link to a folder above it does no harm. A link to nothing counts as a file: reading it raises.

    Args:
        folder: The path of a folder.
        left_out: Counts what is left out.
        decoding: Decides which suffixes count as images.

    Raises:
        DataError: A folder cannot be read.
    """
    images: list[str] = []
    visited: set[tuple[int, int]] = set()
    pending: list[str] = [""]
    linked: list[str] = []  # searched after all real folders, so that images get their real paths
    while pending or linked:
        inside = pending.pop() if pending else linked.pop(0)
        status = _status(os.path.join(folder, inside))
        if (identity := (status.st_dev, status.st_ino)) in visited:
            left_out.add(LeftOut.LINKS_BACK, inside)
            continue
        visited.add(identity)
        for entry in _entries(os.path.join(folder, inside)):
            path = f"{inside}/{entry.name}" if inside else entry.name
            if is_hidden(entry.name):
                left_out.add(LeftOut.HIDDEN, path)
            elif _is_folder(entry):
                (linked if entry.is_symlink() else pending).append(path)
            elif not is_image_name(entry.name, decoding):
                left_out.add(LeftOut.NO_IMAGE, path)
            elif _is_special(entry):
                left_out.add(LeftOut.SPECIAL, path)
            else:
                images.append(path)
    return sorted(images, key=sort_key)


def class_folders(folder: str, left_out: LeftOut) -> list[str]:
    """Names of the folders in a folder, also of those linked to, in the order of `sort_key`.

    Raises:
        DataError: The folder cannot be read.
    """
    names = []
    for entry in _entries(folder):
        if is_hidden(entry.name):
            left_out.add(LeftOut.HIDDEN, entry.name)
        elif _is_folder(entry):
            names.append(entry.name)
        else:
            left_out.add(LeftOut.OUTSIDE, entry.name)
    return sorted(names, key=sort_key)


def class_names(folders: list[str], where: str) -> list[str]:
    """Printable class names of class folders, whose names may not be UTF-8.

    Raises:
        DataError: Two names become equal.
    """
    names = [printable(folder) for folder in folders]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: two class folders are both called {twice!r} when printed; rename one")
    return names


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: os.fsencode(entry.name)))
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot read the folder ({error.strerror})") from None


def _status(folder: str) -> os.stat_result:
    try:
        return os.stat(folder)
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot read the folder ({error.strerror})") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself


def _is_special(entry: os.DirEntry[str]) -> bool:
    """A pipe, socket or device, whose reading could wait forever."""
    try:
        return not stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False  # a link to nothing, or a file without permission: reading it raises
