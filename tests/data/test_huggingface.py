"""Data sets in the format of the Hugging Face hub, without the hub."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from images import COLOURS, make_folder, tiny_values
from later import importorskip_later
from vmamba.data import Decoding, HuggingFaceImages, ImageFolder
from vmamba.errors import DataError
from vmamba.train.recipe import check
from vmamba.train.run import train
from vmamba.train.tasks.classification import ClassificationRecipe

datasets = importorskip_later("datasets", "data")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
NAMES = sorted(COLOURS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageFolder:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return ImageFolder(make_folder(tmp_path / "images") / "train")


def save(folder: ImageFolder, where: Path, kind: Any = None, column: str = "label", **changed: Any) -> str:
    data = {
        "image": [{"bytes": folder.path(i).read_bytes(), "path": None} for i in range(len(folder))],
        column: folder.labels().tolist(),
        **changed,
    }
    features = {"image": datasets.Image(), column: kind or datasets.ClassLabel(names=NAMES)}
    made = datasets.Dataset.from_dict(data, features=datasets.Features(features))
    datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(where))
    return str(where)


def test_a_saved_data_set_is_the_folder(folder: ImageFolder, tmp_path: Path) -> None:
    source = HuggingFaceImages(save(folder, tmp_path / "saved"), "train")
    assert source.classes == folder.classes
    assert len(source) == 18
    source = pickle.loads(pickle.dumps(source))
    for index in range(18):
        (image, label), (expected, expected_label) = source.load(index), folder.load(index)
        assert label == expected_label
        assert image.tobytes() == expected.tobytes()
    assert source.name(3) == f"{tmp_path / 'saved'}[train]: row 3"
    gray = HuggingFaceImages(
        str(tmp_path / "saved" / "train"), "train", decoding=Decoding(channels=1)
    )  # one split alone
    assert gray.load(0)[0].mode == "L"


def test_a_folder_of_images_is_loaded(folder: ImageFolder, tmp_path: Path) -> None:
    source = HuggingFaceImages(str(tmp_path / "images"), "train")
    assert source.classes == NAMES
    assert source.load(17)[0].tobytes() == folder.load(17)[0].tobytes()


def test_labels_without_names(folder: ImageFolder, tmp_path: Path) -> None:
    where = save(folder, tmp_path / "saved", datasets.Value("int64"), column="fine")
    assert HuggingFaceImages(where, "train", label_column="fine").classes == ["0", "1", "2"]
    assert HuggingFaceImages(where, "train", label_column="fine", classes=NAMES).classes == NAMES
    with pytest.raises(DataError, match="label 2 of 2 classes"):
        HuggingFaceImages(where, "train", label_column="fine", classes=NAMES[:2])


def test_what_does_not_fit_is_told(folder: ImageFolder, tmp_path: Path) -> None:
    where = save(folder, tmp_path / "saved")
    for arguments, message in (
        ({"split": "test"}, "no split 'test'; there are 'train', 'validation'"),
        ({"image_column": "img"}, "no column 'img'; set data.image_column to one of 'image', 'label'"),
        ({"image_column": "label"}, "column 'label' holds no images"),
        ({"label_column": "image"}, "column 'image' holds no labels"),
        ({"root": str(tmp_path / "none")}, r"none\[train\]: cannot load the dataset"),
    ):
        with pytest.raises(DataError, match=message):
            HuggingFaceImages(**{"root": where, "split": "train", **arguments})
    names = save(folder, tmp_path / "names", datasets.Value("string"), label=["a"] * 18)
    unknown = save(folder, tmp_path / "unknown", label=[-1] * 18)
    for root in (names, unknown):
        with pytest.raises(DataError, match="column 'label' holds no labels, whole numbers from 0"):
            HuggingFaceImages(root, "train")
    damaged = save(folder, tmp_path / "damaged", image=[{"bytes": b"x", "path": None}] * 17 + [None])
    for row, message in ((3, "row 3: not an image"), (17, "row 17: no image")):
        with pytest.raises(DataError, match=message):
            HuggingFaceImages(damaged, "train").load(row)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_recipe_trains_on_it(workers: int, folder: ImageFolder, tmp_path: Path) -> None:
    values = tiny_values(Path(save(folder, tmp_path / "saved")))
    values["data"] |= {"source": "huggingface", "val_split": "validation"}
    values["schedule"] = {"epochs": 1, "warmup_epochs": 0}
    values["train"]["workers"] = workers
    scores = train(check(ClassificationRecipe, values, "test"), tmp_path / "run").scores
    assert scores.keys() == {"val/loss", "val/top1", "val/top5"}
