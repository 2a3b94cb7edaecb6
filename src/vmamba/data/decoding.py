"""Decode image files for a model: upright, opaque, with the requested channels and bit depth.

Letters in shapes: c channels, h height, w width.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, features
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from vmamba.errors import DataError

log = logging.getLogger(__name__)

DecodedImage: TypeAlias = Image.Image | Tensor
"""A Pillow image of mode "L" or "RGB", or a float32 tensor (c, h, w) with values from 0 to 1."""

# EPS runs Ghostscript; Pillow identifies MPEG but cannot decode it.
_NEVER_READ = {"EPS", "MPEG"}
_NEEDED_FEATURE = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "PNG": "zlib", "WEBP": "webp"}

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPARENT_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
"""Keys of `Image.info` whose metadata may hold an orientation; TIFF has it elsewhere."""
_DEEP_MODES = ("I", "F")
"""First letters of Pillow's modes with more than 8 bits a pixel."""


@dataclass(frozen=True)
class Decoding:
    """How to decode a file.

    Attributes:
        channels: 1 (gray), 3 (RGB), 4 (RGB and alpha as stored, or CMYK), or as many as the files have.
        background: RGB from 0 to 255 behind transparent pixels. Not used with 2 or 4 channels, where alpha is
            a channel.
        value_range: The values of pixels deeper than 8 bits that become black and white; values outside are
            clipped. None for 0 to 65535 (integers) and 0 to 1 (floats); there values outside are an error.
        float_images: Decode to float32 tensors, which keep all bits, as is always done for channels other
            than 1 and 3. Otherwise pixels are rounded to 8 bits, which timm's augmentation needs.
    """

    channels: int = 3
    background: tuple[int, int, int] = (255, 255, 255)
    value_range: tuple[float, float] | None = None
    float_images: bool = False

    @property
    def to_tensor(self) -> bool:
        """Whether images are decoded to tensors."""
        return self.float_images or self.channels not in (1, 3)

    def convert(self, image: DecodedImage, name: str = "image") -> DecodedImage:
        """Convert an opened image to this format; if it has the format already, its pixels do not change.

        Args:
            image: Of any mode. Of several frames only the first is used, unless `channels` is above 4 and
                the number of channels of all frames together.
            name: Its name for messages.

        Raises:
            DataError: It has the wrong number of channels, or values outside of the range of its type.
        """
        if isinstance(image, Tensor):
            if image.ndim != 3 or len(image) != self.channels:
                raise DataError(
                    f"{name}: expected a tensor ({self.channels}, height, width), got {tuple(image.shape)}"
                )
            return image
        if self.to_tensor:
            return _to_tensor(image, self, name)
        return _to_pillow(_upright(image), self, name)


RGB = Decoding()


@cache
def readable_formats() -> tuple[str, ...]:
    """The names of the formats that this Pillow decodes, the most common ones first."""
    Image.init()
    names = []
    for name, (factory, _) in Image.OPEN.items():
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        needed = _NEEDED_FEATURE.get(name)
        if not stub and name not in _NEVER_READ and (needed is None or features.check(needed)):
            names.append(name)
    return tuple(sorted(names, key=lambda name: (name != "JPEG", name != "PNG", name)))


@cache
def image_suffixes() -> frozenset[str]:
    """The suffixes, in lower case and with the dot, of the files that this Pillow decodes."""
    readable = {*readable_formats(), "MPO"}  # a JPEG of some cameras, which Pillow opens as "JPEG"
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in readable)


def is_image_name(name: str, decoding: Decoding = RGB) -> bool:
    """Whether a file's suffix is that of an image; ".npy" counts if images are decoded to tensors."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in image_suffixes() or (suffix == ".npy" and decoding.to_tensor)


def printable(name: str | os.PathLike[str]) -> str:
    """A path for messages and class names, with bytes that are not UTF-8 escaped as `\\xff`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_image(
    file: str | Path | BinaryIO, decoding: Decoding = RGB, name: str | None = None
) -> DecodedImage:
    """Decode an image in full.

    It is turned upright by its EXIF orientation, and gets a background where it is transparent. If images are
    decoded to tensors, `.npy` files with arrays (h, w) or (h, w, c) are read too.

    Args:
        file: A path or an open file, of any format in `readable_formats`.
        decoding: The format to decode to.
        name: Its name for messages; default its path.

    Raises:
        DataError: The file is missing, not an image, damaged or has more pixels than Pillow allows, or its
            channels or values do not fit `decoding`; the message names it.
    """
    return read_oriented(file, decoding, name)[0]


def read_oriented(
    file: str | Path | BinaryIO, decoding: Decoding = RGB, name: str | None = None
) -> tuple[DecodedImage, int]:
    """Decode an image as `read_image` does, and say by which orientation of EXIF it was turned upright.

    Returns:
        The upright image, and the orientation, from 1 (as it is) to 8.

    Raises:
        DataError: As `read_image` does.
    """
    name = printable(str(file)) if name is None else name
    try:
        with without_warnings(name):
            if decoding.to_tensor and name.lower().endswith(".npy"):
                return _read_array(file, decoding, name), 1
            with Image.open(file, formats=readable_formats()) as image:
                orientation = _orientation(image)  # decoding removes a TIFF's
                decoded = decoding.convert(image, name)
                if orientation == 1:
                    orientation = _orientation(image)  # a PNG's may come after its pixels
                return decoded, orientation
    except FileNotFoundError:
        raise DataError(f"{name}: no such image") from None
    except (DataError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name}: too many pixels ({error}); make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except Exception as error:  # on damaged bytes Pillow's decoders raise any exception
        raise DataError(f"{name}: not an image, or a damaged one ({error})") from error


def as_floats(image: DecodedImage) -> Tensor:
    """A decoded image as float32 (c, h, w) from 0 to 1."""
    return image if isinstance(image, Tensor) else pil_to_tensor(image).float() / 255


@contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """Log Pillow's warnings about damaged metadata or many pixels at debug level instead of showing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        log.debug("%s: %s", name, warning.message)


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # this turns a TIFF upright and removes its orientation
    orientation = _orientation(image)
    if orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    for key in _METADATA:
        turned.info.pop(key, None)  # otherwise the next reader would turn it again
    return turned


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, from 1 to 8; 1, upright, if there is none."""
    # If there is no EXIF, Pillow takes longer to look for it than to decode a small PNG.
    if image.format in ("JPEG", "PNG", "WEBP", None) and image.info.keys().isdisjoint(_METADATA):
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata raise any exception, but the pixels are fine
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _to_pillow(image: Image.Image, decoding: Decoding, name: str) -> Image.Image:
    mode = "L" if decoding.channels == 1 else "RGB"
    if image.mode.startswith(_DEEP_MODES):
        values = _deep_values(image, decoding, name)
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert(mode)
    return _opaque(image, decoding.background).convert(mode)


def _opaque(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image over a background, or as it is where no pixel is transparent."""
    if image.mode not in _TRANSPARENT_MODES and "transparency" not in image.info:
        return image
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() == (255, 255):
        rgba.info.pop("transparency", None)
        return rgba.convert("RGB") if image.mode in ("P", "PA") else rgba
    ground = Image.new("RGBA", rgba.size, (*background, 255))
    return Image.alpha_composite(ground, rgba)


def _deep_values(image: Image.Image, decoding: Decoding, name: str) -> NDArray[np.float64]:
    """Pixels of more than 8 bits, (h, w), scaled to [0, 1]; transparent ones get the background."""
    pixels = np.asarray(image)
    values = _scaled(pixels, decoding.value_range, name)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and decoding.channels in (1, 3):
        gray = Image.new("RGB", (1, 1), decoding.background).convert("L").getpixel((0, 0))
        values = np.where(pixels == transparent, float(gray) / 255, values)  # type: ignore[arg-type]
    return values


def _scaled(pixels: NDArray[Any], value_range: tuple[float, float] | None, name: str) -> NDArray[np.float64]:
    whole = np.issubdtype(pixels.dtype, np.integer)
    low, high = value_range or (0.0, 65535.0 if whole else 1.0)
    values = pixels.astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{name}: pixels are NaN or infinite")
    if value_range is None and values.size and not (low <= values.min() and values.max() <= high):
        raise DataError(
            f"{name}: pixels from {values.min():g} to {values.max():g}, expected {low:g} to {high:g}; set "
            "data.value_range to what is black and what is white"
        )
    return np.clip((values - low) / (high - low), 0, 1)


def _to_tensor(image: Image.Image, decoding: Decoding, name: str) -> Tensor:
    frames = getattr(image, "n_frames", 1)
    bands = len(image.getbands())
    if decoding.channels not in (1, 2, 3, 4) and bands * frames == decoding.channels:
        planes = []
        for number in range(frames):
            image.seek(number)
            planes.append(_planes(_upright(image.copy()), decoding, name))
        if len({plane.shape for plane in planes}) > 1:
            raise DataError(f"{name}: its {frames} frames differ in size")
        return _tensor(_checked(np.concatenate(planes, axis=2), decoding.channels, name))
    upright = _upright(image)
    if upright.mode.startswith(_DEEP_MODES):
        planes_deep = _planes(upright, decoding, name)
        if decoding.channels == 3:
            planes_deep = planes_deep.repeat(3, axis=2)
        return _tensor(_checked(planes_deep, decoding.channels, name))
    if decoding.channels in (1, 3):
        mode = "L" if decoding.channels == 1 else "RGB"
        upright = _opaque(upright, decoding.background).convert(mode)
    elif decoding.channels == 2:
        upright = upright.convert("LA")
    elif decoding.channels == 4 and upright.mode != "CMYK":
        upright = upright.convert("RGBA")
    return _tensor(_checked(_planes(upright, decoding, name), decoding.channels, name))


def _planes(image: Image.Image, decoding: Decoding, name: str) -> NDArray[np.float64]:
    """All bands of an image, (h, w, c), from 0 to 1."""
    if image.mode.startswith(_DEEP_MODES):
        return _deep_values(image, decoding, name)[:, :, None]
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    pixels = np.asarray(image, dtype=np.float64) / 255
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _read_array(file: str | Path | BinaryIO, decoding: Decoding, name: str) -> Tensor:
    pixels = np.load(file, allow_pickle=False)
    if not isinstance(pixels, np.ndarray) or pixels.ndim not in (2, 3) or pixels.dtype.kind not in "uif":
        raise DataError(f"{name}: expected an array of numbers (height, width) or (height, width, channels)")
    if pixels.dtype == np.uint8 and decoding.value_range is None:
        values = pixels.astype(np.float64) / 255
    else:
        values = _scaled(pixels, decoding.value_range, name)
    return _tensor(_checked(values if values.ndim == 3 else values[:, :, None], decoding.channels, name))


def _checked(planes: NDArray[np.float64], channels: int, name: str) -> NDArray[np.float64]:
    if planes.shape[2] != channels:
        raise DataError(f"{name}: {planes.shape[2]} channels, and the model takes {channels}")
    return planes


def _tensor(planes: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(planes.transpose(2, 0, 1), dtype=np.float32))
