"""Files become what a viewer shows: upright, opaque, of the channels and the depth asked for."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from vmamba.data import Decoding, image_suffixes, read_image
from vmamba.errors import DataError

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
"""From stored to upright pixels, by EXIF orientation."""


def random_pixels(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, suffix: str, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    file.seek(0)
    return file


def read(file: Any, **decoding: Any) -> Any:
    return np.asarray(read_image(file, Decoding(**decoding), "image"))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp", "jpeg"])
def test_images_are_turned_upright(suffix: str, orientation: int) -> None:
    stored = Image.fromarray(random_pixels(8, 12, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"webp": {"lossless": True}, "jpeg": {"quality": 100}}.get(suffix, {})
    plain = read(encoded(stored, suffix, **options))
    file = encoded(stored, suffix, exif=exif, **options)
    upright = read_image(file, name="image")
    np.testing.assert_array_equal(np.asarray(upright), TURNS[orientation](plain))
    assert Decoding().convert(upright).tobytes() == upright.tobytes()  # not turned twice
    file.seek(0)
    with Image.open(file) as opened:
        assert Decoding().convert(opened).tobytes() == upright.tobytes()
    file.seek(0)
    tensor = read_image(file, Decoding(float_images=True), "image")
    np.testing.assert_array_equal(np.rint(tensor.numpy() * 255).transpose(1, 2, 0), np.asarray(upright))


def test_damaged_metadata_do_no_harm() -> None:
    stored = Image.fromarray(random_pixels(8, 12, 3))
    with warnings.catch_warnings(record=True) as caught:
        damaged = encoded(stored, "png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
        np.testing.assert_array_equal(read(damaged), np.asarray(stored))
    assert not caught


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
def test_transparent_pixels_show_the_background(background: tuple[int, int, int]) -> None:
    pixels = random_pixels(6, 6, 4)
    pixels[..., 3] = np.array([0, 255, 128], dtype=np.uint8)[np.arange(36).reshape(6, 6) % 3]
    shown = read(encoded(Image.fromarray(pixels), "png"), background=background)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + np.array(background) * (1 - alpha)
    assert np.abs(shown - expected).max() <= 1
    assert (shown[pixels[..., 3] == 0] == background).all()
    gray = read(encoded(Image.fromarray(pixels).convert("LA"), "png"), channels=1, background=background)
    ground = Image.new("RGB", (1, 1), background).convert("L").getpixel((0, 0))
    assert (gray[pixels[..., 3] == 0] == ground).all()


@pytest.mark.parametrize("transparency", [3, bytes([0] * 8 + [255] * 8)], ids=["index", "table"])
def test_transparent_palettes(transparency: Any) -> None:
    image = Image.fromarray(random_pixels(8, 8, 3)).quantize(16)
    numbers = np.asarray(image)
    hidden = numbers == 3 if transparency == 3 else numbers < 8
    shown = read(encoded(image, "png", transparency=transparency))
    assert (shown[hidden] == 255).all()
    np.testing.assert_array_equal(shown[~hidden], np.asarray(image.convert("RGB"))[~hidden])


@pytest.mark.parametrize(("mode", "colour"), [("L", 100), ("RGB", (1, 2, 3))])
def test_a_transparent_colour(mode: str, colour: Any) -> None:
    image = Image.new(mode, (4, 2), colour)
    image.putpixel((0, 0), 50 if mode == "L" else (50, 50, 50))
    shown = read(encoded(image, "png", transparency=colour))
    assert shown[0, 0].tolist() == [50] * 3
    assert shown[0, 1].tolist() == [255] * 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
@pytest.mark.parametrize(("channels", "target"), [(1, "L"), (3, "RGB")])
def test_opaque_images_are_converted_as_pillow_does(mode: str, channels: int, target: str) -> None:
    image = Image.fromarray(random_pixels(9, 7, 3)).convert(mode)
    shown: Any = Decoding(channels).convert(image)
    assert shown.mode == target
    assert shown.tobytes() == image.convert(target).tobytes()


DEEP = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)


def test_sixteen_bits_are_scaled() -> None:
    def file() -> io.BytesIO:
        return encoded(Image.fromarray(DEEP), "png")

    assert read(file(), channels=1).tolist() == [[0, 1, 128, 255]]
    assert read(file())[0, :, 2].tolist() == [0, 1, 128, 255]
    assert read(file(), channels=1, value_range=(257, 32896)).tolist() == [[0, 0, 255, 255]]
    whole = read_image(file(), Decoding(1, float_images=True), "image")
    torch.testing.assert_close(whole, torch.tensor([[[0, 257, 32896, 65535]]]) / 65535)
    rgb = read_image(file(), Decoding(3, float_images=True), "image")
    assert torch.equal(rgb, whole.expand(3, 1, 4))
    transparent = encoded(Image.fromarray(DEEP), "png", transparency=257)
    assert read(transparent, channels=1).tolist() == [[0, 255, 128, 255]]


def test_whole_and_float_numbers(tmp_path: Path) -> None:
    whole = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert read(encoded(whole, "tiff"), channels=1).tolist() == [[0, 255]]
    floats = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    assert read(encoded(floats, "tiff"), channels=1).tolist() == [[0, 128, 255]]
    for values, message in (
        ([[-1, 5]], "pixels from -1 to 5, expected 0 to 65535; set data.value_range"),
        ([[0.0, 200.0]], "pixels from 0 to 200, expected 0 to 1; set data.value_range"),
        ([[0.0, float("nan")]], "pixels are NaN or infinite"),
    ):
        kind = np.int32 if isinstance(values[0][0], int) else np.float32
        with pytest.raises(DataError, match=f"image: {message}"):
            read(encoded(Image.fromarray(np.array(values, dtype=kind)), "tiff"))
    ranged = Image.fromarray(np.array([[-1000, 0, 1000]], dtype=np.int32))
    assert read(encoded(ranged, "tiff"), channels=1, value_range=(-1000, 1000)).tolist() == [[0, 128, 255]]


def test_four_channels() -> None:
    pixels = random_pixels(4, 5, 4)
    for mode, suffix in (("RGBA", "png"), ("CMYK", "tiff")):
        tensor: Any = read_image(encoded(Image.fromarray(pixels, mode), suffix), Decoding(4), "image")
        np.testing.assert_array_equal(np.rint(tensor.numpy() * 255).transpose(1, 2, 0), pixels)
    opaque: Any = read_image(encoded(Image.fromarray(pixels[..., :3]), "png"), Decoding(4), "image")
    assert (opaque[3] == 1).all()


def test_frames_and_arrays_are_channels(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 65536, (5, 4, 6), dtype=np.uint16)
    frames = [Image.fromarray(band) for band in bands]
    frames[0].save(tmp_path / "bands.tiff", save_all=True, append_images=frames[1:])
    np.save(tmp_path / "bands.npy", bands.transpose(1, 2, 0))
    for name in ("bands.tiff", "bands.npy"):
        tensor: Any = read_image(tmp_path / name, Decoding(5))
        torch.testing.assert_close(tensor, torch.from_numpy(bands / 65535).float())
        with pytest.raises(DataError, match=rf"{name}: \d channels, and the model takes 6"):
            read_image(tmp_path / name, Decoding(6))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects\.npy: not an image"):
        read_image(tmp_path / "objects.npy", Decoding(5))
    np.save(tmp_path / "flat.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"flat\.npy: expected an array of numbers \(height, width\)"):
        read_image(tmp_path / "flat.npy", Decoding(5))
    with pytest.raises(DataError, match=r"expected a tensor \(3, height, width\), got \(5, 2, 2\)"):
        Decoding(3).convert(torch.zeros(5, 2, 2))


def test_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    many = Image.fromarray(random_pixels(12, 12, 3))
    np.testing.assert_array_equal(read(encoded(many, "png")), np.asarray(many))  # without Pillow's warning
    with pytest.raises(DataError, match=r"image: too many pixels .* raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        read(encoded(many.resize((30, 30)), "png"))


def test_truncated_files() -> None:
    whole = encoded(Image.fromarray(random_pixels(64, 64, 3)), "jpeg").getvalue()
    with pytest.raises(DataError, match=r"image: not an image, or a damaged one .*truncated"):
        read(io.BytesIO(whole[: len(whole) // 2]))


def test_suffixes() -> None:
    assert {".jpg", ".jfif", ".mpo", ".png", ".gif", ".ppm", ".pgm", ".bmp", ".tif"} <= image_suffixes()
    avif = ".avif" in Image.registered_extensions() and features.check("avif")
    assert (".avif" in image_suffixes()) == bool(avif)
    assert not {".eps", ".pdf", ".mpg", ".h5", ".txt", ".npy", ""} & image_suffixes()
