"""The section `data` of a recipe: what it accepts, and what it opens."""

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional as F

from images import COLOURS, make_folder, tiny_values
from vmamba.config import Section, describe_problems
from vmamba.data import (
    ClassificationData,
    ClassificationSection,
    DataSection,
    Decoding,
    DetectionData,
    ImageDataset,
    ImageFolder,
    ImageSource,
    SampleKey,
    SegmentationData,
    SplitImages,
    TarImages,
    class_weights,
    write_shards,
    write_tar,
)
from vmamba.data.section import union_of_sources
from vmamba.data.sources.ade20k import Ade20kSection
from vmamba.data.sources.coco import CocoSection
from vmamba.data.sources.folder import FolderSection
from vmamba.data.sources.huggingface import HuggingFaceSection
from vmamba.data.sources.masks import MasksSection
from vmamba.data.sources.mnist import MnistSection
from vmamba.data.sources.shapes import ShapesDetectionSection, ShapesSegmentationSection
from vmamba.data.sources.tar import TarSection
from vmamba.data.sources.webdataset import WebDatasetSection
from vmamba.errors import DataError, RecipeError
from vmamba.train.recipe import check, override_values
from vmamba.train.run import train
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask


class Holder(Section):
    data: ClassificationData = FolderSection()


def parse(**values: Any) -> Any:
    return Holder.model_validate({"data": values}).data


def problems(**values: Any) -> list[str]:
    with pytest.raises(ValidationError) as raised:
        parse(**values)
    return [sentence for _, sentence in describe_problems(Holder, raised.value)]


EARLIER_DEFAULTS = {
    "root": "/images",
    "train_split": "train",
    "val_split": "val",
    "classes": None,
    "image_column": "image",
    "label_column": "label",
    "shuffle_shards": 16,
    "cache_dir": None,
    "cache_gb": 100.0,
    "channels": 3,
    "image_size": 224,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
"""All keys that every source had, as runs of earlier versions wrote them out."""


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("folder", FolderSection),
        ("tar", TarSection),
        ("webdataset", WebDatasetSection),
        ("huggingface", HuggingFaceSection),
        ("mnist", MnistSection),
    ],
)
def test_recipes_of_earlier_versions(source: str, kind: type[DataSection]) -> None:
    values = {**EARLIER_DEFAULTS, "source": source}
    if source == "webdataset":
        values["classes"] = 3
    data = parse(**values)
    assert type(data) is kind
    assert Holder.model_validate(Holder(data=data).model_dump(mode="json")).data == data
    assert data.preprocessing(None).size == (224, 224)


def test_what_is_wrong_is_named() -> None:
    assert parse() == FolderSection()
    (unknown,) = problems(source="zip")
    start, _, listed = unknown.partition("; expected one of ")
    assert start == "data.source: no source 'zip'"
    assert set(listed.split(", ")) >= {"'folder'", "'huggingface'", "'mnist'", "'tar'", "'webdataset'"}
    assert problems(source="tar", rot="x") == ["data.rot: no such key; did you mean 'root'?"]
    assert problems(cache_gb=5.0)[0].startswith("data.cache_gb: no such key; expected one of source, root")
    with pytest.raises(ValidationError) as raised:
        Holder.model_validate({"data": [1]})
    (problem,) = describe_problems(Holder, raised.value)
    assert problem == ("data", "data: expected keys and their values, got [1]")
    assert problems(root=5) == ["data.root: Input should be a valid string, got 5"]
    assert problems(source="webdataset") == [
        "data: classes: missing; a text file with a name a line, or the number of classes"
    ]
    assert problems(source="mnist", channels=4) == [
        "data.channels: the digits are gray, 1 channel or 3 equal ones; got 4"
    ]
    assert "data.image_size: expected at least 8 pixels, got (224, 4)" in problems(image_size=[224, 4])
    assert problems(background=[0, 0, 256])[0].startswith("data: background: expected three values from 0")
    assert problems(value_range=[1.0, 1.0])[0].startswith("data: value_range (1.0, 1.0): the first is not")
    assert problems(class_weights={"a": -1.0}) == ["data.class_weights: expected weights of at least 0"]
    for key, value in (("val_fraction", 0.1), ("sampling", "balanced"), ("class_weights", "balanced")):
        (problem,) = problems(
            **{"source": "webdataset", "root": "s3://a", "classes": 2, "cache_dir": "/c", key: value}
        )
        assert problem.startswith(f"data: {key}: needs all labels")
    with pytest.raises(RecipeError, match=r"data\.root: missing"):
        FolderSection().open("train")


def test_what_is_not_said_is_the_models() -> None:
    cfg: Any = timm.get_pretrained_cfg("beit_base_patch16_224")
    assert parse().preprocessing(cfg).mean == (0.5, 0.5, 0.5)
    assert parse().preprocessing(cfg).crop_pct == cfg.crop_pct
    changed = parse(image_size=[64, 96], channels=1, mean=[0.1], crop_pct=1.0, interpolation="bilinear")
    preprocessing = changed.preprocessing(cfg)
    assert preprocessing.size == (64, 96)
    assert (preprocessing.channels, preprocessing.mean, preprocessing.std) == (1, (0.1,), (0.5,))
    assert (preprocessing.crop_pct, preprocessing.interpolation) == (1.0, "bilinear")
    assert parse(image_size=64).preprocessing(cfg).size == (64, 64)
    for data in (parse(), changed):
        written = data.resolved(cfg)
        assert written.preprocessing(None) == data.preprocessing(cfg)
        assert Holder.model_validate(Holder(data=written).model_dump(mode="json")).data == written
    with pytest.raises(RecipeError, match="data: mean has 2 values for 3 channels"):
        parse(mean=[0.1, 0.2]).preprocessing(cfg)


def test_a_folder_without_splits_is_split(tmp_path: Path) -> None:
    root = make_folder(tmp_path) / "train"
    sides = {split: parse(root=str(root), val_fraction=0.3).open(split) for split in ("train", "val")}
    assert {split: len(side) for split, side in sides.items()} == {"train": 12, "val": 6}
    below = parse(root=str(tmp_path), val_fraction=0.3).open("val")  # of the folder "train" in it
    assert [below.key(i) for i in range(6)] == [sides["val"].key(i) for i in range(6)]
    alone = parse(root=str(tmp_path), val_fraction=0.3).without_training_split().open("val")
    assert [alone.key(i) for i in range(6)] == [sides["val"].key(i) for i in range(6)]
    assert parse(root=str(tmp_path), val_split="v").without_training_split().train_split == "v"
    other = parse(root=str(root), val_fraction=0.3, split_seed=1).open("val")
    assert [other.key(i) for i in range(6)] != [sides["val"].key(i) for i in range(6)]
    write_tar(root, tmp_path / "all.tar")
    tar = parse(source="tar", root=str(tmp_path), train_split="all.tar", val_fraction=0.3).open("val")
    assert isinstance(tar, SplitImages)
    assert isinstance(tar.source, TarImages)
    assert [tar.key(i) for i in range(6)] == [sides["val"].key(i) for i in range(6)]
    mnist = {split: parse(source="mnist", val_fraction=0.1).open(split) for split in ("train", "val")}
    assert {split: len(side) for split, side in mnist.items()} == {"train": 4500, "val": 500}


def task(root: Path, *overrides: str) -> ClassificationTask:
    values = override_values(tiny_values(root), overrides)
    return ClassificationTask(check(ClassificationRecipe, values, "test"))


def test_a_validation_split_may_lack_a_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path)
    for file in (root / "val" / "blue").iterdir():
        file.unlink()
    for file in (root / "val" / "green").iterdir():
        file.unlink()
    (root / "val" / "green").rmdir()
    made = task(root)
    dataset = made.dataset("val")
    assert made.classes == sorted(COLOURS)
    assert {dataset[SampleKey(0, index)][1] for index in range(len(dataset))} == {2}
    assert f"{root}/val: no samples of 2 of 3 classes: 'blue', 'green'" in caplog.text
    (root / "val" / "unused").mkdir()
    task(root).dataset("val")
    (root / "val" / "red").rename(root / "val" / "rot")
    with pytest.raises(DataError, match=r"val: not the model's 3 classes; .*, not expected 'rot'"):
        task(root).dataset("val")
    for file in (root / "train" / "red").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="red: no images in this class folder"):
        task(root)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_every_source_turns_images_upright(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side
    stored = Image.new("RGB", (6, 4))
    for colour, place in (((255, 0, 0), (0, 0)), ((0, 0, 255), (5, 3))):
        stored.putpixel(place, colour)
    (tmp_path / "f" / "train" / "a").mkdir(parents=True)
    file = tmp_path / "f" / "train" / "a" / "0.png"
    stored.save(file, exif=exif)
    write_tar(tmp_path / "f" / "train", tmp_path / "train.tar")
    write_shards(tmp_path / "f" / "train", tmp_path / "shards")
    content = {"image": [{"bytes": file.read_bytes(), "path": None}], "label": [0]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(content, features)}).save_to_disk(
        tmp_path / "hub"
    )
    for values in (
        {"root": str(tmp_path / "f")},
        {"source": "tar", "root": str(tmp_path), "train_split": "train.tar"},
        {"source": "webdataset", "root": str(tmp_path / "shards"), "train_split": "*.tar", "classes": 1},
        {"source": "huggingface", "root": str(tmp_path / "hub")},
    ):
        image, label = parse(**values).open("train").load(0)
        assert (image.size, label) == ((4, 6), 0)
        assert image.getpixel((3, 0)) == (255, 0, 0)
        assert image.getpixel((0, 5)) == (0, 0, 255)


def test_a_missing_split_says_how_to_make_one(tmp_path: Path) -> None:
    root = make_folder(tmp_path) / "train"
    with pytest.raises(DataError, match=r"train/val: no such folder; .* or data\.val_fraction=0\.2 to hold"):
        parse(root=str(root)).open("val")


@pytest.mark.parametrize("name", ["nothing", "vmamba_pico.nothing"])
def test_an_unknown_model_is_told_before_data_are_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown model '{name}'"):
        task(tmp_path / "missing", f"model.name={name}")


def test_classes_of_the_model_in_another_order(tmp_path: Path) -> None:
    source = ImageFolder(make_folder(tmp_path) / "train")
    source.use_classes(["red", "unseen", "green", "blue"])
    assert source.labels().tolist() == [3] * 6 + [2] * 6 + [0] * 6
    assert [source.load(index)[1] for index in (0, 6, 12)] == [3, 2, 0]


def test_one_class_is_a_dataset(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / split / "only" / f"{number}.png")
    made = task(tmp_path)
    assert made.classes == ["only"]
    assert len(made.dataset("train")) == len(made.dataset("val")) == 4


def test_class_weights(tmp_path: Path) -> None:
    labels = np.array([0] * 6 + [2] * 2)
    torch.testing.assert_close(class_weights(labels, 3), torch.tensor([8 / 12, 1.0, 8 / 4]))
    source = ImageFolder(make_folder(tmp_path) / "train")
    assert parse().loss_weights(source) is None
    assert parse(class_weights={"red": 3.0}).loss_weights(source).tolist() == [1, 1, 3]
    with pytest.raises(DataError, match=r"data\.class_weights: .*train has no class 'rot'"):
        parse(class_weights={"rot": 3.0}).loss_weights(source)
    assert parse().sampling_classes(source) is None
    assert parse(sampling="balanced").sampling_classes(source).tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_the_loss_is_weighted(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for number in range(3):
        (root / "train" / "red" / f"{number}.png").unlink()
    made = task(root, "data.class_weights=balanced", "augment.label_smoothing=0.0")
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 2])
    loss = made.training_step(lambda _: logits, (torch.zeros(4), labels))["loss"]  # type: ignore[arg-type]
    weights = torch.tensor([15 / 18, 15 / 18, 15 / 9])
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, weight=weights))


def test_a_run_on_balanced_wide_images_that_are_split(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images") / "train"
    values = override_values(
        tiny_values(root),
        [
            "data.val_fraction=0.3",
            "data.sampling=balanced",
            "data.image_size=[32, 48]",
            "schedule.epochs=1",
            "schedule.warmup_epochs=0",
        ],
    )
    recipe = check(ClassificationRecipe, values, "test")
    image, _ = ClassificationTask(recipe).dataset("train")[SampleKey(0, 0)]
    assert image.shape == (3, 32, 48)
    assert train(recipe, tmp_path / "run").scores.keys() == {"val/loss", "val/top1", "val/top5"}


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_a_run_on_other_channels(channels: int, tmp_path: Path) -> None:
    suffix = "npy" if channels == 5 else "png"
    for split in ("train", "val"):
        for label, name in enumerate(("dark", "bright")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = np.full((16, 16, channels), 100 * label + number, dtype=np.uint8)
                path = tmp_path / split / name / f"{number}.{suffix}"
                if suffix == "npy":
                    np.save(path, pixels)
                else:
                    Image.fromarray(pixels.squeeze()).save(path)
    values = override_values(
        tiny_values(tmp_path),
        [f"data.channels={channels}", "augment.auto_augment=null", "augment.color_jitter=0.0"],
    )
    values["schedule"] = {"epochs": 1, "warmup_epochs": 0}
    recipe = check(ClassificationRecipe, values, "test")
    assert train(recipe, tmp_path / "run").scores.keys() == {"val/loss", "val/top1", "val/top5"}
    if channels > 3:
        with pytest.raises(RecipeError, match="auto_augment and color_jitter are for 8-bit images"):
            task(tmp_path, f"data.channels={channels}").dataset("train")


class Boxes(ImageSource[list[int]]):
    """Images with boxes, in files of which a list is kept: what a dense task brings of its own."""

    def __init__(self, root: str, decoding: Decoding) -> None:
        self.root, self.decoding = Path(root), decoding
        self.files = sorted(os.listdir(root))

    def __len__(self) -> int:
        return len(self.files)

    def open(self, index: int) -> Path:
        return self.root / self.files[index]

    def target(self, index: int) -> list[int]:
        return [0, 0, index, index]

    def name(self, index: int) -> str:
        return str(self.open(index))

    def key(self, index: int) -> str:
        return self.files[index]


class BoxesSection(DataSection):
    source: Literal["boxes"] = "boxes"
    boxes: str = "boxes.json"

    def open(self, split: Any, decoding: Decoding = Decoding()) -> Boxes:  # noqa: B008  (frozen)
        return Boxes(self._root(), decoding)


class JointDataset(ImageDataset[list[int]]):
    def augment(self, image: Any, target: list[int]) -> tuple[Any, list[int]]:
        return image, [*target, int(torch.randint(1000, ()))]


def test_a_source_with_other_targets(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("RGBA", (6, 4)).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"damaged")
    section = BoxesSection(root=str(tmp_path))
    dataset = JointDataset(section.open("train"), seed=3)
    image, target = dataset[SampleKey(1, 2)]
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert target[:4] == [0, 0, 2, 2]
    assert dataset[SampleKey(1, 2)][1] == target
    assert dataset[SampleKey(1, 2, 1)][1] != target  # the second time in an epoch
    with pytest.raises(DataError, match=r"3\.png: not an image"):
        dataset[SampleKey(0, 3)]
    with pytest.raises(ValidationError):  # it is no source of classified images
        parse(source="boxes")


def test_a_new_source_registers_itself() -> None:
    class OtherBase(ClassificationSection): ...

    class Zip(OtherBase):
        source: Literal["zip"] = "zip"

        def open_split(self, split: Any, decoding: Decoding) -> Any: ...

    class Other(Section):
        data: union_of_sources(OtherBase, "zip")  # type: ignore[valid-type]

    assert type(Other.model_validate({"data": {}}).data) is Zip


def test_two_sources_of_one_name_are_refused() -> None:
    class TwiceBase(ClassificationSection): ...

    class One(TwiceBase):
        source: Literal["one"] = "one"

    class Copied(TwiceBase):
        source: Literal["one"] = "one"

    with pytest.raises(TypeError, match="Copied: 'one' is the source of One already"):
        union_of_sources(TwiceBase, "one")


class Dense(Section):
    detection: DetectionData = CocoSection()
    segmentation: SegmentationData = MasksSection()


def test_sources_of_detection_and_segmentation() -> None:
    def kinds(**values: Any) -> tuple[type, type]:
        section = Dense.model_validate({"detection": values, "segmentation": values})
        return type(section.detection), type(section.segmentation)

    assert kinds() == (CocoSection, MasksSection)
    assert kinds(source="shapes") == (ShapesDetectionSection, ShapesSegmentationSection)
    for values in ({"source": "folder"}, {"image_size": 224}, {"sampling": "balanced"}, {"crop_pct": 0.9}):
        for task in ("detection", "segmentation"):
            with pytest.raises(ValidationError):
                Dense.model_validate({task: values})


def test_dense_sections_take_mean_and_deviation_of_the_model() -> None:
    model = timm.create_model("test_convnext")
    section = ShapesSegmentationSection(float_images=True)
    resolved = section.resolved(model)
    assert (resolved.channels, resolved.mean, resolved.std) == (
        3,
        tuple(model.default_cfg["mean"]),
        tuple(model.default_cfg["std"]),
    )
    assert resolved.resolved(model) == resolved
    assert resolved.preprocessing(model).decoding == Decoding(3, float_images=True)
    with pytest.raises(RecipeError, match="data: mean has 3 values for 5 channels"):
        resolved.model_copy(update={"channels": 5}).preprocessing(model)


def test_dense_sections_without_the_training_split() -> None:
    section = CocoSection(val_split="v", val_annotations="v.json").without_training_split()
    assert (section.train_split, section.train_annotations) == ("v", "v.json")
    assert Ade20kSection().without_training_split().train_split == "validation"
