"""Object storage through fsspec, with downloads that are retried and never leave a partial file."""

import os
import time
from pathlib import Path
from typing import Any

from vmamba.errors import DataError

_RETRY_WAITS = (1.0, 4.0)
"""Seconds before a download is tried again."""


def is_url(root: str) -> bool:
    """Whether `root` is an address rather than a path."""
    return "://" in root


def file_system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    It is created in each call, because one that was created before a fork does not work after it.

    Raises:
        DataError: fsspec does not know the address, or is not installed.
    """
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{url}: {error}; to read object storage: pip install 'vmamba[data]'") from error
    except ValueError as error:
        raise DataError(f"{url}: no address that fsspec knows ({error})") from error


def download(url: str, path: Path) -> None:
    """Fetch a file; if that fails there is nothing at `path`. Only one process at a time may call this.

    Raises:
        DataError: It cannot be fetched.
    """
    partial = path.with_name(f"{path.name}.part")
    for wait in (*_RETRY_WAITS, None):
        try:
            fs, inside = file_system(url)
            expected = fs.info(inside)["size"]
            fs.get_file(inside, str(partial))
            size = partial.stat().st_size
            if expected is not None and size != expected:
                raise OSError(f"{size} of {expected} bytes came")
            os.replace(partial, path)
            return
        except DataError:
            raise
        except Exception as error:  # every storage raises its own types
            partial.unlink(missing_ok=True)
            if wait is None or isinstance(error, FileNotFoundError):
                raise DataError(f"{url}: cannot fetch the shard ({error!r})") from error
            time.sleep(wait)
