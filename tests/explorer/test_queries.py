import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from dense_models import segmenter
from explorer.explored import BLOCK, make_images, small_model
from vmamba.analysis.attention import KINDS, AttentionError, scan_attention
from vmamba.analysis.receptive_field import ReceptiveFieldError, contribution, receptive_field
from vmamba.data.preprocessing import Preprocessing
from vmamba.dense_inference import SegmentationPredictor
from vmamba.errors import DataError, ModelError
from vmamba.explorer import Explorer, ExplorerError, ShownModel
from vmamba.explorer import images as uploads
from vmamba.inference import ClassificationPredictor


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def explorer(paths: list[str]) -> Iterator[Explorer]:
    explorer = Explorer([small_model()], paths)
    yield explorer
    explorer.close()


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_what_there_is_to_choose_from(explorer: Explorer) -> None:
    state = explorer.state()
    assert [model["name"] for model in state["models"]] == ["small"]
    assert len(state["models"][0]["blocks"]) == 5
    assert state["images"] == [{"id": "0", "name": "image 0.png"}, {"id": "1", "name": "image 1.png"}]
    assert [kind["name"] for kind in state["kinds"]] == list(KINDS)


@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 101, 191])
def test_a_row_is_the_analysis(
    kind: str, with_delta: bool, position: int, explorer: Explorer, paths: list[str]
) -> None:
    shown = explorer.models[0]
    routes, row = explorer.row(0, "1", BLOCK, position, kind, with_delta)
    image = shown.preprocessing.transform()(shown.preprocessing.read(paths[1]))
    attention = scan_attention(shown.predictor.model, image, stage=0, block=1)
    assert routes == attention.routes
    assert row.shape == (4, 16, 12)
    assert torch.equal(row.isnan(), ~attention.reached(position))
    assert torch.equal(row.nan_to_num(), attention.row(position, kind, with_delta))


def test_the_model_runs_once_for_all_rows_of_a_block(paths: list[str]) -> None:
    shown = small_model()
    explorer = Explorer([shown], paths)
    runs: list[None] = []
    shown.predictor.model.register_forward_hook(lambda *_: runs.append(None))
    for position in range(20):
        explorer.row(0, "0", BLOCK, position, "CwBw", False)
    assert len(runs) == 1
    explorer.row(0, "1", BLOCK, 0, "CwBw", False)
    assert len(runs) == 2
    explorer.close()


def test_projections_are_forgotten_when_they_take_too_much(
    paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmamba.explorer.queries._KEPT_BYTES", 1)
    shown = small_model()
    explorer = Explorer([shown], paths)
    runs: list[None] = []
    shown.predictor.model.register_forward_hook(lambda *_: runs.append(None))
    for image in ("0", "0", "1", "0"):
        explorer.row(0, image, BLOCK, 5, "CwBw", False)
    assert len(runs) == 3
    explorer.close()


def test_the_modes_stay_as_they_are(paths: list[str]) -> None:
    shown = small_model()
    explorer = Explorer([shown], paths)
    model = shown.predictor.model.train()
    explorer.row(0, "0", BLOCK, 0, "CwBw", False)
    explorer.field(0, "0", (0.5, 0.5))
    with pytest.raises(ReceptiveFieldError):
        explorer.field(0, "0", (0.5, 1.0))
    assert all(module.training for module in model.modules())
    explorer.close()


def test_a_receptive_field_is_the_analysis(explorer: Explorer, paths: list[str]) -> None:
    shown = explorer.models[0]
    image = shown.preprocessing.transform()(shown.preprocessing.read(paths[0]))
    centre = explorer.field(0, "0", (0.5, 0.5))
    assert centre.shape == (64, 48)
    assert torch.equal(centre, receptive_field(shown.predictor.model, [image]))
    corner = explorer.field(0, "0", (0.1, 0.9))
    assert torch.equal(corner, contribution(shown.predictor.model, image, (0.1, 0.9)))
    assert not torch.equal(corner, centre)


def test_predictions_and_pictures(paths: list[str]) -> None:
    shown = small_model()
    explorer = Explorer([shown, small_model("other", 1)], paths)
    expected = shown.predictor(paths[1])
    classes = explorer.prediction(0, "1")["classes"]
    assert [each["label"] for each in classes] == [each.label for each in expected.classes]
    assert [each["score"] for each in classes] == [each.score for each in expected.classes]
    assert explorer.prediction(1, "1")["classes"] != classes
    picture = Image.open(io.BytesIO(explorer.picture(0, "1")))
    resized = Image.open(paths[1]).resize((48, 64), Image.Resampling.BICUBIC)
    assert picture.size == (48, 64)
    assert np.abs(np.asarray(picture, float) - np.asarray(resized, float)).max() <= 1
    explorer.close()


def test_a_larger_input(paths: list[str]) -> None:
    shown = small_model()
    explorer = Explorer([ShownModel("small", shown.predictor, (96, 128))], paths)
    assert explorer.state()["models"][0]["blocks"][1] == {"name": BLOCK, "height": 24, "width": 32}
    assert explorer.row(0, "0", BLOCK, 700, "CB", False)[1].shape == (4, 24, 32)
    assert explorer.field(0, "0", (0.5, 0.5)).shape == (96, 128)
    explorer.close()


def test_a_segmenter_tells_its_prediction_in_words(paths: list[str]) -> None:
    predictor = SegmentationPredictor(
        segmenter(), Preprocessing(size=(64, 64)), list("abcde"), base_size=(64, 96)
    )
    explorer = Explorer([ShownModel("segmenter", predictor)], paths)
    assert explorer.prediction(0, "0") == {"text": predictor(paths[0]).text()}
    block = explorer.state()["models"][0]["blocks"][0]
    assert explorer.row(0, "0", block["name"], 0, "CwBw", False)[1].shape[1:] == (
        block["height"],
        block["width"],
    )
    explorer.close()


def test_models_without_maps_are_refused() -> None:
    with pytest.raises(ModelError, match=r"line: nothing to explore, .* a cascade scans line by line"):
        Explorer([small_model("line", routes="cascade")])
    other = timm.create_model("test_resnet", num_classes=3)
    predictor = ClassificationPredictor(other, Preprocessing(size=(64, 64)), list("abc"))
    with pytest.raises(ModelError, match="resnet: nothing to explore, the model has no SS2D"):
        Explorer([ShownModel("resnet", predictor)])


def test_bad_queries(explorer: Explorer) -> None:
    with pytest.raises(
        ExplorerError, match=r"small has no block 'stages\.9'.*; there are stages\.0\.blocks\.0"
    ):
        explorer.row(0, "0", "stages.9", 0, "CwBw", False)
    with pytest.raises(AttentionError, match=r"position: expected 0 to 191 .* got 192"):
        explorer.row(0, "0", BLOCK, 192, "CwBw", False)
    with pytest.raises(AttentionError, match="kind: expected"):
        explorer.row(0, "0", BLOCK, 0, "QK", False)
    with pytest.raises(ExplorerError, match="there is no model 1; expected 0 to 0"):
        explorer.picture(1, "0")
    with pytest.raises(uploads.UnknownImageError, match="there is no image '7'"):
        explorer.prediction(0, "7")


def test_uploads(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MOST_UPLOADS", 2)
    explorer = Explorer([small_model()])
    files = [
        file_of(Image.new("RGB", (9, 7), (value, 0, 0)), kind)
        for value, kind in ((1, "PNG"), (2, "JPEG"), (3, "GIF"))
    ]
    first, second, third = (explorer.images.add(f"{number}", data) for number, data in enumerate(files))
    assert explorer.images.add("again", files[2]) == third
    assert explorer.images.names() == {second: "1", third: "again"}
    assert Image.open(io.BytesIO(explorer.picture(0, third))).getpixel((5, 5)) == (3, 0, 0)
    with pytest.raises(uploads.UnknownImageError, match="the last 2; add it again"):
        explorer.picture(0, first)
    explorer.close()


def test_uploads_are_turned_upright(explorer: Explorer) -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the left is up
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    picture = Image.open(io.BytesIO(explorer.picture(0, explorer.images.add("turned", file.getvalue()))))
    assert picture.getpixel((24, 5))[0] > 200
    assert picture.getpixel((24, 58))[0] < 50


def test_files_are_called_by_their_place_below_the_folder_of_all(tmp_path: Path) -> None:
    names = [os.path.join("b", "a.png"), os.path.join("c", "a.png"), "d.png"]
    assert list(uploads.Images([str(tmp_path / name) for name in names]).names().values()) == names
    assert uploads.Images([str(tmp_path / names[0])]).names() == {"0": "a.png"}
    assert uploads.Images([]).names() == {}


def too_many_pixels() -> bytes:
    return file_of(Image.new("1", (10_000, 10_000)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no image", "mine: not an image, or a damaged one; expected JPEG, PNG, "),
        (b"", "mine: not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "mine: not an image"),
        (b"P6 2 2 255 123412341234", "mine: not an image"),
        (b"x" * (20 * 2**20 + 1), "mine: 20.0 MiB, and at most 20 MiB are taken"),
        (too_many_pixels(), "mine: 10,000 × 10,000 pixels; at most 40 million are taken"),
    ],
    ids=["text", "empty", "EPS", "PPM", "huge file", "huge image"],
)
def test_bad_uploads(data: bytes, message: str) -> None:
    images = uploads.Images([])
    with pytest.raises(DataError) as caught:
        images.add("mine", data)
    assert str(caught.value).startswith(message)
    assert images.names() == {}


def test_an_upload_that_is_damaged_behind_its_header(explorer: Explorer, paths: list[str]) -> None:
    data = Path(paths[0]).read_bytes()
    key = explorer.images.add("cut", data[: len(data) // 2])
    with pytest.raises(DataError, match="cut: not an image, or a damaged one"):
        explorer.picture(0, key)


def test_bad_files_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "large.png").write_bytes(too_many_pixels())
    for name, message in (
        ("broken.png", "not an image, or a damaged one"),
        ("large.png", "10,000 × 10,000 pixels"),
        ("none.png", r"cannot be read \(No such file"),
        ("", r"cannot be read \(Is a directory"),
    ):
        with pytest.raises(DataError, match=f"{tmp_path / name}: {message}"):
            Explorer([small_model()], [str(tmp_path / name)])


def test_images_of_many_channels(tmp_path: Path) -> None:
    model = small_model(in_chans=5)
    predictor = ClassificationPredictor(
        model.predictor.model, Preprocessing(5, (64, 48), (0.5,) * 5, (0.25,) * 5), ["a", "b", "c"]
    )
    np.save(tmp_path / "five.npy", np.random.default_rng(0).integers(0, 255, (64, 48, 5), np.uint8))
    explorer = Explorer([ShownModel("five", predictor)], [str(tmp_path / "five.npy")])
    assert Image.open(io.BytesIO(explorer.picture(0, "0"))).mode == "RGB"
    assert len(explorer.prediction(0, "0")["classes"]) == 3
    explorer.close()
