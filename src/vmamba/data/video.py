"""Videos: their frames as upright images, and pictures as a video. Both need PyAV."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vmamba.data.decoding import printable
from vmamba.errors import DataError, OutputError
from vmamba.files import replacing

SUFFIXES = frozenset(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .webm .wmv".split()  # noqa: SIM905
)
"""The suffixes of videos, in lower case."""

_TURNED = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}
_MISSING_SECONDS = 0.25
"""A video may end so much earlier than its file says; containers round."""

_LARGEST_MPEG4_BASE = 65535
_FINE = Fraction(1, 60000)
"""A unit of time for MPEG-4, which knows no smaller ones than 1/65535 s."""


def is_video_name(name: str | os.PathLike[str]) -> bool:
    """Whether a file's suffix is that of a video."""
    return os.path.splitext(os.fsdecode(name))[1].lower() in SUFFIXES


@dataclass(frozen=True)
class Frame:
    """A frame of a video.

    Attributes:
        number: From 0.
        seconds: Since the beginning.
        image: Upright, RGB.
    """

    number: int
    seconds: float
    image: Image.Image


class Video:
    """A video file, opened for reading its frames once, in order; only one of them is in memory.

    Args:
        path: The file.
        every: Give the first of so many frames.

    Attributes:
        rate: Frames a second in the file, on average.
        time_base: The unit of its times, in seconds.

    Raises:
        DataError: It is missing or not a video, or PyAV is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], every: int = 1) -> None:
        self._av = _pyav()
        self._name, self._every = printable(path), every
        try:
            # Opened here: FFmpeg would take a name with a colon for an address.
            self._file = open(path, "rb")  # noqa: SIM115
        except OSError as error:
            raise DataError(f"{self._name}: cannot be read ({error.strerror})") from None
        try:
            self._container = self._av.open(self._file, **_lenient(self._av))
            stream = self._container.streams.best("video")
        except (self._av.error.FFmpegError, ValueError, EOFError) as error:
            self._file.close()
            raise DataError(f"{self._name}: not a video, or a damaged one ({_reason(error)})") from error
        if stream is None:
            self.close()
            raise DataError(f"{self._name}: there is no video in it")
        stream.thread_type = "AUTO"
        self._stream = stream
        self.rate = _fraction(stream.guessed_rate or stream.average_rate or Fraction(25))
        self.time_base = _fraction(stream.time_base or 1 / self.rate)

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        """The frames.

        Raises:
            DataError: The video is damaged or ends too early: once all that can be read has been given.
        """
        count, end, damaged = 0, 0.0, []
        try:
            for frame in self._container.decode(self._stream):
                seconds = self._seconds(frame, count)
                end = seconds + float(1 / self.rate)
                if frame.is_corrupt:
                    damaged.append(count)
                if count % self._every == 0:
                    yield Frame(count, seconds, _upright(frame))
                count += 1
        except (self._av.error.FFmpegError, ValueError, EOFError) as error:
            raise DataError(
                f"{self._name}: damaged, nothing can be read after {count:,} frames ({end:.2f} s; "
                f"{_reason(error)})"
            ) from error
        promised = self._promised()
        if count == 0:
            raise DataError(f"{self._name}: damaged, there is no frame that can be read")
        if promised is not None and promised - end > max(_MISSING_SECONDS, float(2 / self.rate)):
            raise DataError(
                f"{self._name}: truncated, it ends after {count:,} frames ({end:.2f} s of {promised:.2f} s)"
            )
        if damaged:
            raise DataError(
                f"{self._name}: damaged, {len(damaged):,} of {count:,} frames are not as they were, the "
                f"first is frame {damaged[0]:,}"
            )

    def _seconds(self, frame: Any, number: int) -> float:
        if frame.pts is None:
            return float(number / self.rate)
        return float((frame.pts - (self._stream.start_time or 0)) * self.time_base)

    def _promised(self) -> float | None:
        """Seconds that the video should last, as the file says."""
        stream = self._stream
        if self._container.format.name == "avi":  # the duration of a truncated one is that of what is left
            return float(stream.frames * self.time_base) if stream.frames else None
        if stream.duration:
            return float(stream.duration * self.time_base)
        parts = stream.metadata.get("DURATION", "").split(":")  # Matroska, WebM
        try:
            hours, minutes, seconds = map(float, parts)
        except ValueError:
            return None
        return hours * 3600 + minutes * 60 + seconds


def _fraction(value: Any) -> Fraction:
    """A rational number of PyAV, which from version 19 on is of a type of its own."""
    return Fraction(value.numerator, value.denominator)


def _lenient(av: Any) -> dict[str, str]:
    """The argument by which titles and the like may be other than UTF-8; from version 19 on they may."""
    return {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turn = _TURNED.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(turn)


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(f"videos need PyAV ({error}): pip install 'vmamba[video]'") from error
    return av


@contextmanager
def writing_video(
    path: str | os.PathLike[str], size: tuple[int, int], rate: Fraction, time_base: Fraction
) -> Iterator[Callable[[Image.Image, float], None]]:
    """Write an MP4 file, which replaces `path` once it is complete.

    It is encoded as H.264, or as MPEG-4 where PyAV has been built without x264; with one colour for each 2×2
    pixels, since browsers and QuickTime play nothing else. So an odd width or height becomes even: the last
    column or row comes twice.

    Args:
        path: The file.
        size: Width and height of the pictures, before they become even; those of another size are resized.
        rate: Pictures a second, on average.
        time_base: The unit of times, in seconds.

    Yields:
        A function to call with each picture and its time in seconds, which rises.

    Raises:
        OutputError: It cannot be written.
    """
    av = _pyav()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    if codec == "mpeg4" and time_base.denominator > _LARGEST_MPEG4_BASE:
        time_base = _FINE
    last = -1
    with replacing(path) as temporary, _as_output_errors(path, av), _container(av, temporary) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = (side + side % 2 for side in size)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = time_base

        def write(picture: Image.Image, seconds: float) -> None:
            nonlocal last
            picture = picture.convert("RGB")
            pixels = np.asarray(picture if picture.size == size else picture.resize(size))
            more = (0, size[1] % 2), (0, size[0] % 2), (0, 0)
            frame = av.VideoFrame.from_ndarray(np.pad(pixels, more, mode="edge"), format="rgb24")
            last = max(last + 1, round(seconds / time_base))
            frame.pts, frame.time_base = last, time_base
            container.mux(stream.encode(frame))

        yield write
        container.mux(stream.encode(None))


@contextmanager
def _as_output_errors(path: str | os.PathLike[str], av: Any) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        raise OutputError(f"{printable(path)}: cannot be written ({_reason(error)})") from error


@contextmanager
def _container(av: Any, path: Path) -> Iterator[Any]:
    """Closed also after an error, which would otherwise leave the file open."""
    with open(path, "wb") as file:
        container = av.open(file, "w", format="mp4")
        try:
            yield container
        finally:
            container.close()
