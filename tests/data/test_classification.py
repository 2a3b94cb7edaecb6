from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from images import COLOURS, make_folder, tiny_values
from vmamba.data import (
    Decoding,
    EpochSampler,
    ImageFolder,
    MnistSubset,
    ResumableLoader,
    SampleKey,
    read_image,
)
from vmamba.data.classes import class_difference
from vmamba.errors import DataError
from vmamba.train.recipe import check, override_values
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def test_image_folder(root: Path) -> None:
    (root / "train" / "red" / "nested").mkdir()
    Image.new("RGB", (4, 4)).save(root / "train" / "red" / "nested" / "deep.JPG", format="jpeg")
    (root / "train" / "red" / "notes.txt").write_text("no image")
    (root / "train" / "red" / "._0.png").write_bytes(b"what macOS leaves behind")
    (root / "train" / ".cache").mkdir()
    source = ImageFolder(root / "train")
    assert source.classes == sorted(COLOURS)
    assert len(source) == 19
    image, label = source.load(0)
    assert (image.mode, image.size, label) == ("RGB", (20, 16), 0)
    assert source.name(18) == str(root / "train" / "red" / "nested" / "deep.JPG")
    assert ImageFolder(root / "train", Decoding(channels=1)).load(0)[0].mode == "L"


@pytest.mark.parametrize(
    ("actual", "difference"),
    [
        (["cat"], "missing 'dog'"),
        (["cat", "dog", "cow"], "not expected 'cow'"),
        (["cow", "dog"], "missing 'cat', not expected 'cow'"),
        (["dog", "cat"], "in another order"),
        (
            [str(number) for number in range(12)],
            "missing 'cat', 'dog', not expected '0', '1', '2', '3', '4', '5', '6', '7', '8', '9' and 2 more",
        ),
    ],
)
def test_how_classes_differ(actual: list[str], difference: str) -> None:
    assert class_difference(actual, ["cat", "dog"]) == difference


def test_missing_folder_and_empty_class(root: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        ImageFolder(root / "nowhere")
    with pytest.raises(DataError, match="red: no class folders in it"):
        ImageFolder(root / "train" / "red")
    for image in (root / "train" / "green").iterdir():
        image.unlink()
    with pytest.raises(DataError, match="green: no images in this class folder"):
        ImageFolder(root / "train")
    assert len(ImageFolder(root / "train", allow_empty=True)) == 12


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "webp", "bmp", "tif", "gif", "avif", "ppm", "tga", "ico", "pcx", "sgi"]
)
def test_damaged_images_are_named(suffix: str, tmp_path: Path) -> None:
    """Cut or changed anywhere, an image is read or told, and nothing else happens."""
    random = np.random.default_rng(0)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    messages = []
    for trial in range(60):
        content = bytearray(whole)
        if trial % 2:
            content = content[: random.integers(len(whole))]
        else:
            for place in random.integers(min(len(whole), 300), size=5):
                content[place] = random.integers(256)
        path.write_bytes(content)
        try:
            read_image(path)
        except DataError as error:
            messages.append(str(error))
    assert len(messages) >= 20
    assert all(message.startswith(f"{path}: ") for message in messages)


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: no such image"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="not an image"):
        read_image(tmp_path)


def test_mnist() -> None:
    train, val = MnistSubset("train"), MnistSubset("val", Decoding(channels=1))
    assert (len(train), len(val)) == (4000, 1000)
    assert np.bincount(val.labels()).tolist() == [100] * 10
    assert np.bincount(train.labels()).tolist() == [400] * 10
    assert not set(train.numbers.tolist()) & set(val.numbers.tolist())
    image, label = val.load(999)
    assert (image.mode, image.size, label) == ("L", (32, 32), 9)
    assert np.asarray(image)[:2].max() == 0
    assert train.load(0)[0].mode == "RGB"


def augmented(root: Path, workers: int, *overrides: str) -> dict[SampleKey, torch.Tensor]:
    values = override_values(tiny_values(root), overrides)
    dataset = ClassificationTask(check(ClassificationRecipe, values, "test")).dataset("train")
    actual = {}
    for epoch in (0, 1):
        sampler = EpochSampler(len(dataset), shuffle=False)
        sampler.set_epoch(epoch)
        loader = ResumableLoader(dataset, sampler, batch_size=4, num_workers=workers)
        images = torch.cat([loaded.batch[0] for loaded in loader])
        actual.update(zip(sampler, images, strict=True))
    return actual


def test_augmentation_depends_on_seed_epoch_and_sample_alone(root: Path) -> None:
    strong = ["augment.random_erasing=1.0", "augment.rotate=20.0", "augment.color_jitter=0.4"]
    alone = augmented(root, 0, *strong)
    torch.manual_seed(17)
    shared = augmented(root, 2, *strong)
    assert alone.keys() == shared.keys()
    for key in alone:
        assert torch.equal(alone[key], shared[key]), key
    assert not torch.equal(alone[SampleKey(0, 0)], alone[SampleKey(1, 0)])
    other = augmented(root, 0, "train.seed=1", *strong)
    assert not torch.equal(alone[SampleKey(0, 0)], other[SampleKey(0, 0)])
