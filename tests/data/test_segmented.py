"""Folders of images and masks."""

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vmamba.data.names import ADE20K_CLASSES
from vmamba.data.orientation import turned_pixels
from vmamba.data.sources.ade20k import Ade20kSection
from vmamba.data.sources.masks import MaskFolder, MasksSection, MaskValues
from vmamba.errors import DataError, RecipeError

NAMES = ["road", "car", "sky"]
VALUES = np.array([[0, 1, 2, 255], [2, 2, 1, 0]], dtype=np.uint8)
"""The mask of most tests: 2×4 pixels, one of them ignored."""


def save(path: Path, pixels: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def make(root: Path, mask: np.ndarray = VALUES, name: str = "a", **options: Any) -> Path:
    """One image with a mask in the split "train"."""
    save(root / "images" / "train" / f"{name}.jpg", np.zeros((*mask.shape[:2], 3), dtype=np.uint8))
    save(root / "masks" / "train" / f"{name}.png", mask, **options)
    return root


def opened(root: Path, **values: Any) -> MaskFolder:
    return MasksSection.model_validate({"root": str(root), "classes": NAMES, **values}).open("train")


def test_labels_of_an_image(tmp_path: Path) -> None:
    source = opened(make(make(tmp_path), name="sub/b"))
    assert [source.key(index) for index in range(len(source))] == ["a.jpg", "sub/b.jpg"]
    image, labels = source.load(1)
    assert (image.size, labels.dtype) == ((4, 2), np.uint8)
    assert np.array_equal(labels, VALUES)
    assert source.classes == NAMES


def palette(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(mask)
    image.putpalette([250, 10, 10] * 256)
    return image


def four_bits(mask: np.ndarray) -> bytes:
    """A gray PNG of 4 bits a pixel, which Pillow cannot write."""
    rows = b"".join(b"\0" + bytes(a << 4 | b for a, b in row.reshape(-1, 2)) for row in mask)
    header = struct.pack(">IIBBBBB", mask.shape[1], mask.shape[0], 4, 0, 0, 0, 0)
    blocks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in blocks
    )


def write_palette(path: Path) -> None:
    palette(VALUES).save(path)


def write_16_bits(path: Path) -> None:
    Image.fromarray(VALUES.astype(np.uint16)).save(path)


def write_four_bits(path: Path) -> None:
    path.write_bytes(four_bits(np.where(VALUES == 255, 15, VALUES)))


def write_palette_of_two_bits(path: Path) -> None:
    palette(np.where(VALUES == 255, 3, VALUES)).save(path, bits=2)


@pytest.mark.parametrize(
    ("write", "ignore"),
    [(write_palette, 255), (write_16_bits, 255), (write_four_bits, 15), (write_palette_of_two_bits, 3)],
)
def test_forms_of_masks(tmp_path: Path, write: Callable[[Path], None], ignore: int) -> None:
    source = opened(make(tmp_path), ignore=ignore)
    write(tmp_path / "masks" / "train" / "a.png")
    assert np.array_equal(source.target(0), VALUES)


def test_masks_of_one_bit(tmp_path: Path) -> None:
    source = opened(make(tmp_path))
    Image.fromarray(VALUES == 2).save(tmp_path / "masks" / "train" / "a.png")
    assert np.array_equal(source.target(0), VALUES == 2)


def test_values_above_255_of_16_bits(tmp_path: Path) -> None:
    wide = np.array([[7, 1000], [65535, 7]], dtype=np.uint16)
    (tmp_path / "names.json").write_text('{"7": "road", "1000": "car"}')
    source = opened(make(tmp_path, wide), classes="names.json", ignore=[65535])
    assert source.target(0).tolist() == [[0, 1], [255, 0]]


def test_reduce_zero_label(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 2, 3, 255]], dtype=np.uint8)
    source = opened(make(tmp_path, mask), reduce_zero_label=True)
    assert source.target(0).tolist() == [[255, 0, 1, 2, 255]]
    assert source.classes == NAMES


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("names.txt", "road\ncar\nsky\n"),
        ("names.json", json.dumps(NAMES)),
        ("names.json", json.dumps({"0": "road", "2": "sky", "1": "car"})),
    ],
)
def test_names_in_a_file(tmp_path: Path, file: str, text: str) -> None:
    (tmp_path / file).write_text(text)
    assert opened(make(tmp_path), classes=file).classes == NAMES
    assert opened(make(tmp_path), classes=str(tmp_path / file)).classes == NAMES


def test_a_class_may_be_ignored(tmp_path: Path) -> None:
    source = opened(make(tmp_path), ignore=[0, 255])
    assert source.classes == ["car", "sky"]
    assert source.target(0).tolist() == [[255, 0, 1, 255], [1, 1, 0, 255]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.full((2, 4), 3, np.uint8), r"a\.png: pixels of the value 3, which is none of the 3 classes"),
        (np.full((2, 4), 300, np.uint16), r"a\.png: pixels of the value 300, which"),
        (np.zeros((2, 4, 3), np.uint8), r"a\.png: a mask in colour \(RGB\)"),
        (np.zeros((2, 4, 4), np.uint8), r"a\.png: a mask in colour \(RGBA\)"),
    ],
)
def test_wrong_masks_are_refused(tmp_path: Path, mask: np.ndarray, message: str) -> None:
    source = opened(make(tmp_path))
    save(tmp_path / "masks" / "train" / "a.png", mask)
    with pytest.raises(DataError, match=message):
        source.load(0)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_damaged_masks_are_refused(tmp_path: Path, content: bytes | None) -> None:
    source = opened(make(tmp_path))
    path = tmp_path / "masks" / "train" / "a.png"
    path.write_bytes(path.read_bytes()[:-25] if content is None else content)
    with pytest.raises(DataError, match=r"a\.png: not a mask in PNG format, or a damaged one"):
        source.load(0)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png: no such mask"):
        source.load(0)


def test_a_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    source = opened(make(tmp_path))
    save(tmp_path / "masks" / "train" / "a.png", np.zeros((2, 5), np.uint8))
    with pytest.raises(DataError, match=r"a\.jpg: the image has 4×2 pixels, its annotation is for 5×2"):
        source.load(0)


def test_a_damaged_image_is_refused(tmp_path: Path) -> None:
    source = opened(make(tmp_path))
    (tmp_path / "images" / "train" / "a.jpg").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"a\.jpg: not an image"):
        source.load(0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_are_turned_with_the_image(tmp_path: Path, orientation: int) -> None:
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[2:6, 3:15] = 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.repeat(mask[:, :, None] * np.uint8(255), 3, 2)
    save(tmp_path / "images" / "train" / "a.png", pixels, exif=exif)
    save(tmp_path / "masks" / "train" / "a.png", mask)
    image, labels = opened(tmp_path).load(0)
    assert np.array_equal(np.asarray(image)[:, :, 0] > 0, labels > 0)
    if orientation >= 5:  # drawn on the upright image
        save(tmp_path / "masks" / "train" / "a.png", np.ascontiguousarray(turned_pixels(mask, orientation)))
        _, upright = opened(tmp_path).load(0)
        assert np.array_equal(upright, labels)


def without_masks(root: Path) -> None:
    make(root)
    make(root, name="b")
    (root / "masks" / "train" / "b.png").unlink()


def without_images(root: Path) -> None:
    make(root)
    save(root / "masks" / "train" / "c.png", VALUES)


def two_images(root: Path) -> None:
    make(root)
    save(root / "images" / "train" / "a.png", np.zeros((2, 4, 3), np.uint8))


def no_images(root: Path) -> None:
    (root / "images" / "train").mkdir(parents=True)
    (root / "masks" / "train").mkdir(parents=True)


def no_mask_folder(root: Path) -> None:
    (root / "images" / "train").mkdir(parents=True)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (without_masks, r"masks/train: no mask for 1 image of .*images/train: 'b\.jpg'; expected b\.png"),
        (without_images, r"images/train: no image for 1 mask of .*masks/train: 'c\.png'"),
        (two_images, r"two images for one mask, a\.jpg and a\.png"),
        (no_images, r"images/train: no images in it"),
        (no_mask_folder, r"masks/train: no such folder of masks"),
        (lambda root: None, r"images/train: no such folder of images"),
    ],
)
def test_wrong_folders_are_refused(tmp_path: Path, prepare: Callable[[Path], None], message: str) -> None:
    prepare(tmp_path)
    with pytest.raises(DataError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("text", ["[1, 2]", '{"road": 0}', "3", '{"0": null}'])
def test_wrong_files_of_names_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "names.json").write_text(text)
    with pytest.raises(DataError, match=r"names\.json: expected a list of names, or an object such as"):
        opened(make(tmp_path), classes="names.json")


def test_wrong_keys_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(RecipeError, match=r"data\.classes: missing"):
        opened(tmp_path, classes=None)
    with pytest.raises(RecipeError, match=r"data\.ignore: expected values from 0 to 65535, got -1"):
        opened(tmp_path, ignore=-1)
    with pytest.raises(DataError, match=r"names\.json: cannot read the names"):
        opened(tmp_path, classes="names.json")
    for names in (["a", "a"], [], [""], [str(number) for number in range(256)]):
        with pytest.raises(DataError, match=r"data\.classes: expected 1 to 255 classes"):
            MaskValues(names, ())


def test_classes_of_a_model(tmp_path: Path) -> None:
    source = opened(make(tmp_path))
    source.use_classes(NAMES)
    with pytest.raises(DataError, match="missing 'bike', not expected 'sky'"):
        source.use_classes(["road", "car", "bike"])
    with pytest.raises(DataError, match="3 classes; in another order"):
        source.use_classes(NAMES[::-1])


def test_ade20k(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 150]], dtype=np.uint8)
    save(tmp_path / "images" / "validation" / "ADE_val_1.jpg", np.zeros((1, 3, 3), np.uint8))
    save(tmp_path / "annotations" / "validation" / "ADE_val_1.png", mask)
    source = Ade20kSection(root=str(tmp_path)).open("val")
    assert source.target(0).tolist() == [[255, 0, 149]]
    assert (len(ADE20K_CLASSES), source.classes[0], source.classes[149]) == (150, "wall", "flag")
    assert source.classes[44] == "chest of drawers"  # not broken at a line's end
    save(tmp_path / "annotations" / "validation" / "ADE_val_1.png", mask + np.uint8(1))
    with pytest.raises(DataError, match="pixels of the value 151, which is none of the 150 classes"):
        source.target(0)
