"""The images of an explorer: files that were named at its start, and uploads."""

import hashlib
import io
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from vmamba.data.decoding import DecodedImage, printable, readable_formats, without_warnings
from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import DataError

MOST_BYTES = 20 * 2**20
"""Of an upload."""

MOST_PIXELS = 40_000_000
"""Of an image; one of 10,000 × 10,000 pixels may be a small file that fills the memory."""

MOST_UPLOADS = 32
"""Uploads that are kept; the oldest is forgotten."""


def upload_formats() -> list[str]:
    """The formats of uploads: every other decoder would be one more that a file could attack."""
    return [
        name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in readable_formats()
    ]


class UnknownImageError(DataError):
    """There is no image of that name, or not any more."""


class Images:
    """Images by their identity: a number for a file, a digest of its bytes for an upload.

    Args:
        paths: Of the files; they are read when they are shown.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = {str(number): path for number, path in enumerate(paths)}
        self._names = dict(zip(self._paths, _short_names(paths), strict=True))
        self._uploads: dict[str, tuple[str, bytes]] = {}
        self._lock = threading.Lock()

    def names(self) -> dict[str, str]:
        """The name of each image by its identity; a file's begins below the folder of all."""
        with self._lock:
            return self._names | {key: name for key, (name, _) in self._uploads.items()}

    def add(self, name: str, data: bytes) -> str:
        """Keep an upload.

        Returns:
            Its identity; the same bytes have the same one.

        Raises:
            DataError: It is not an image of a known format, or too large.
        """
        if len(data) > MOST_BYTES:
            raise DataError(too_many_bytes(name, len(data)))
        with _opened(io.BytesIO(data), name, upload_formats()):
            pass
        key = hashlib.sha256(data).hexdigest()[:16]
        with self._lock:
            self._uploads[key] = (name, data)
            while len(self._uploads) > MOST_UPLOADS:
                del self._uploads[next(iter(self._uploads))]
        return key

    def read(self, key: str, preprocessing: Preprocessing) -> DecodedImage:
        """Decode an image for a model.

        Args:
            key: Its identity.
            preprocessing: Of the model.

        Raises:
            UnknownImageError: There is no such image.
            DataError: It is missing, damaged or too large.
        """
        if key in self._paths:
            return _read_file(self._paths[key], preprocessing)
        with self._lock:
            upload = self._uploads.get(key)
        if upload is None:
            raise UnknownImageError(
                f"there is no image {key!r} any more: uploads are kept until the explorer ends, the last "
                f"{MOST_UPLOADS}; add it again"
            )
        name, data = upload
        return _decoded(io.BytesIO(data), name, preprocessing, upload_formats())


def _short_names(paths: Sequence[str]) -> list[str]:
    """Paths from the folder that all files are below."""
    try:
        above = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths] or ["."])
    except ValueError:  # drives of Windows
        return [printable(path) for path in paths]
    return [printable(os.path.relpath(path, above)) for path in paths]


def _read_file(path: str, preprocessing: Preprocessing) -> DecodedImage:
    name = printable(path)
    if preprocessing.decoding.to_tensor and path.lower().endswith(".npy"):
        return preprocessing.read(path, name)
    try:
        with open(path, "rb") as file:
            return _decoded(file, name, preprocessing, readable_formats())
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def too_many_bytes(name: str, number: int) -> str:
    """The message for an upload that is too large."""
    return f"{name}: {number / 2**20:,.1f} MiB, and at most {MOST_BYTES // 2**20} MiB are taken"


def _decoded(file: BinaryIO, name: str, preprocessing: Preprocessing, formats: Sequence[str]) -> DecodedImage:
    with _opened(file, name, formats) as image:
        return preprocessing.convert(image, name)


@contextmanager
def _opened(file: BinaryIO, name: str, formats: Sequence[str]) -> Iterator[Image.Image]:
    """An image that is not too large by its header; until then nothing is decoded."""
    try:
        with without_warnings(name), Image.open(file, formats=tuple(formats)) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise DataError(f"{name}: {width:,} × {height:,} pixels; {_SMALLER}")
            yield image
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{name}: not an image, or a damaged one; expected {', '.join(formats)}") from None
    except Image.DecompressionBombError:
        raise DataError(f"{name}: too many pixels; {_SMALLER}") from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise any exception
        raise DataError(f"{name}: not an image, or a damaged one ({error})") from error


_SMALLER = f"at most {MOST_PIXELS / 1e6:.0f} million are taken, make it smaller"
