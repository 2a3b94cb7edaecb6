"""COCO's instance format: what is read, turned, left out and refused."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as codes
from pycocotools.coco import COCO

from vmamba.data import Decoding
from vmamba.data.coco_format import read_instances
from vmamba.data.orientation import turned_boxes, turned_pixels
from vmamba.data.sources.coco import CocoImages, CocoSection
from vmamba.errors import DataError

WIDTH, HEIGHT = 40, 30
FOLDERS = [folder / "shared" / "data" / "coco128" for folder in Path(__file__).parents]
IMAGES_OF_COCO = next((folder for folder in FOLDERS if folder.is_dir()), None)
Content = dict[str, Any]


def annotation(number: int, **changes: Any) -> Content:
    """A square of 10 pixels at (5, 6)."""
    square = [5, 6, 15, 6, 15, 16, 5, 16]
    values = {
        "id": number,
        "image_id": 7,
        "category_id": 3,
        "bbox": [5, 6, 10, 10],
        "segmentation": [square],
        "area": 100,
        "iscrowd": 0,
    }
    return {**values, **changes}


def content(*annotations: Content) -> Content:
    """A file of one image, 7, with category ids that have gaps and are not in order."""
    return {
        "images": [{"id": 7, "file_name": "seven.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": list(annotations),
        "categories": [{"id": 90, "name": "cat"}, {"id": 3, "name": "dog"}],
    }


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Content], CocoImages]:
    """The source of a file's content, beside a gray image."""
    Image.new("RGB", (WIDTH, HEIGHT), (90, 90, 90)).save(tmp_path / "seven.png")

    def write(values: Any) -> CocoImages:
        (tmp_path / "instances.json").write_text(json.dumps(values))
        return CocoImages(tmp_path, tmp_path / "instances.json")

    return write


def test_objects_of_an_image(opened: Callable[..., CocoImages]) -> None:
    ring = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    ring[2:8, 3:9] = 1
    ring[4:6, 5:7] = 0
    crowd = codes.encode(np.asfortranarray(ring))
    code = {"size": [HEIGHT, WIDTH], "counts": crowd["counts"].decode()}
    plain = {"size": [HEIGHT, WIDTH], "counts": _runs(ring)}
    source = opened(
        content(
            annotation(12, category_id=90, area=None),
            annotation(11, iscrowd=1, segmentation=plain, bbox=[3, 2, 6, 6]),
            annotation(13, segmentation=code, bbox=[3, 2, 6, 6]),
        )
    )
    assert (source.classes, source.category_ids) == (["dog", "cat"], [3, 90])
    image, objects = source.load(0)
    assert image.size == (WIDTH, HEIGHT)
    assert (objects.image_id, objects.size, objects.ids) == (7, (HEIGHT, WIDTH), [12, 11, 13])
    assert objects.labels.tolist() == [1, 0, 0]
    assert objects.crowd.tolist() == [False, True, False]
    assert objects.areas.tolist() == [100, 100, 100]
    assert objects.boxes.tolist() == [[5, 6, 15, 16], [3, 2, 9, 8], [3, 2, 9, 8]]
    masks = objects.decoded_masks()
    square = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    square[6:16, 5:15] = 1
    assert torch.equal(masks, torch.stack([square, torch.from_numpy(ring), torch.from_numpy(ring)]))
    assert (source.size(0), source.has_objects(0)) == ((HEIGHT, WIDTH), True)
    assert source.class_counts().tolist() == [2, 1]


def _runs(mask: np.ndarray) -> list[int]:
    """COCO's run lengths, column by column, the first of zeros."""
    runs, last = [0], 0
    for value in mask.T.ravel().tolist():
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    return runs


def test_several_polygons_are_one_object(opened: Callable[..., CocoImages]) -> None:
    halves = [[0, 0, 4, 0, 4, 4, 0, 4], [10.25, 10, 14, 10, 14, 14.123, 10, 14]]  # not whole hundredths
    objects = opened(content(annotation(1, segmentation=halves, area=None))).target(0)
    assert objects.masks == [codes.merge(codes.frPyObjects(halves, HEIGHT, WIDTH))]
    assert objects.areas.tolist() == [32]


def test_an_image_without_objects(opened: Callable[..., CocoImages]) -> None:
    source = opened(content())
    _, objects = source.load(0)
    assert len(objects) == 0
    assert objects.boxes.shape == (0, 4)
    assert objects.decoded_masks().shape == (0, HEIGHT, WIDTH)
    assert objects.labels.dtype == torch.int64
    assert not source.has_objects(0)


def test_an_image_of_crowds_alone_has_no_objects(opened: Callable[..., CocoImages]) -> None:
    assert not opened(content(annotation(1, iscrowd=1))).has_objects(0)


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([30, 20, 10, 10], [30, 20, 40, 30]),  # at the border
        ([-5, -5, 20, 20], [-5, -5, 15, 15]),
        ([35, 25, 100, 100], [35, 25, 135, 125]),
        ([40, 5, 10, 10], [40, 5, 50, 15]),  # outside
        ([4, 4, 1, 1], [4, 4, 5, 5]),
        ([4, 4, 0.5, 0.5], [4, 4, 4.5, 4.5]),
    ],
)
def test_boxes_are_the_files(
    opened: Callable[..., CocoImages], bbox: list[float], expected: list[float]
) -> None:
    assert opened(content(annotation(1, bbox=bbox))).target(0).boxes.tolist() == [expected]


TWO_POINTS = {"segmentation": [[5, 6, 9, 9]]}
LINES = {"segmentation": [[5, 6, 9, 10, 7, 8], [5.1, 6.1, 5.1, 9.3, 5.1, 7.7, 5.1, 8.2]]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [5, 6, 0, 10]}, "a box without area, or an inverted one"),
        ({"bbox": [15, 16, -10, -10]}, "a box without area, or an inverted one"),
        (TWO_POINTS, "no outline, or one without area"),
        (LINES, "no outline, or one without area"),
        ({"segmentation": []}, "no outline, or one without area"),
        ({"segmentation": [[]]}, "no outline, or one without area"),
        ({"segmentation": None}, "no outline, or one without area"),
        (
            {"segmentation": {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT]}},
            "no outline, or one without area",
        ),
    ],
)
def test_what_is_left_out_is_logged(
    opened: Callable[..., CocoImages], caplog: pytest.LogCaptureFixture, changes: Content, reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        source = opened(content(annotation(1, **changes), annotation(2), annotation(3, **changes)))
    assert source.target(0).ids == [2]
    (record,) = caplog.records
    assert record.getMessage().endswith(f"instances.json: left out 2 annotations: 2 with {reason}")


def test_a_polygon_of_two_points_beside_others(opened: Callable[..., CocoImages]) -> None:
    square = [5, 6, 15, 6, 15, 16, 5, 16]
    objects = opened(content(annotation(1, segmentation=[[1, 2, 3, 4], square]))).target(0)
    assert objects.decoded_masks().sum() == 100


def test_polygons_that_cross_themselves_have_an_area(opened: Callable[..., CocoImages]) -> None:
    bow_tie = [5, 6, 15, 16, 15, 6, 5, 16]
    objects = opened(content(annotation(1, segmentation=[bow_tie]))).target(0)
    assert objects.decoded_masks().sum() > 40


@pytest.mark.parametrize("bbox", [[40, 5, 10, 10], [-20, 5, 10, 10], [5, 30, 9, 9], [5, -9, 9, 9]])
def test_an_image_of_objects_outside_of_it_has_none(
    opened: Callable[..., CocoImages], bbox: list[int]
) -> None:
    assert not opened(content(annotation(1, bbox=bbox))).has_objects(0)


NAN, CODE = float("nan"), {"size": [HEIGHT, WIDTH]}
WRONG_ANNOTATIONS = {
    "unknown category": ({"category_id": 4}, "annotation 5: there is no category 4"),
    "unknown image": ({"image_id": 8}, "annotation 5: there is no image 8"),
    "no box": ({"bbox": None}, r"annotation 5: bbox: expected \[x, y, width, height\]"),
    "short box": ({"bbox": [1, 2, 3]}, "annotation 5: bbox"),
    "box of text": ({"bbox": ["1", 2, 3, 4]}, "annotation 5: bbox"),
    "NaN in the box": ({"bbox": [NAN, 2, 3, 4]}, "annotation 5: bbox"),
    "infinite box": ({"bbox": [1, 2, float("inf"), 4]}, "annotation 5: bbox"),
    "NaN in a polygon": ({"segmentation": [[NAN, 1, 2, 3, 4, 5]]}, "annotation 5: segmentation"),
    "odd polygon": ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "annotation 5: segmentation"),
    "polygon of text": ({"segmentation": [["a"] * 6]}, "annotation 5: segmentation"),
    "polygon far away": ({"segmentation": [[0, 0, 1e9, 0, 1e9, 1e9]]}, "annotation 5: segmentation"),
    "flat polygon": ({"segmentation": [1, 2, 3, 4, 5, 6]}, "annotation 5: segmentation"),
    "mask of another kind": ({"segmentation": "mask.png"}, "annotation 5: segmentation"),
    "code of another size": (
        {"segmentation": {"size": [WIDTH, HEIGHT], "counts": [1200]}},
        r"annotation 5: segmentation: a run-length code of size \[40, 30\], its image has \[30, 40\]",
    ),
    "short code": ({"segmentation": {**CODE, "counts": [600, 10]}}, "annotation 5: .* damaged"),
    "long code": ({"segmentation": {**CODE, "counts": [600, 700]}}, "annotation 5: .* damaged"),
    "negative run": ({"segmentation": {**CODE, "counts": [-10, 1210]}}, "annotation 5: .* damaged"),
    "short text": ({"segmentation": {**CODE, "counts": "34"}}, "annotation 5: .* damaged"),
    "cut text": ({"segmentation": {**CODE, "counts": "zzz"}}, "annotation 5: .* damaged"),
    "other text": ({"segmentation": {**CODE, "counts": "é\n"}}, "annotation 5: .* damaged"),
    "no counts": ({"segmentation": CODE}, "annotation 5: .* damaged"),
    "crowd": ({"iscrowd": 2}, "annotation 5: iscrowd: expected 0 or 1, got 2"),
    "area": ({"area": NAN}, "annotation 5: area: expected a number, got nan"),
    "id": ({"id": "five"}, r"annotations\[1\]: expected a whole number as its id, got 'five'"),
    "id twice": ({"id": 4}, "annotation 4: a second annotation of this id"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_ANNOTATIONS.values(), ids=WRONG_ANNOTATIONS)
def test_wrong_annotations_are_refused(
    opened: Callable[..., CocoImages], changes: Content, message: str
) -> None:
    with pytest.raises(DataError, match=rf"instances\.json: {message}"):
        opened(content(annotation(4), {**annotation(5), **changes}))


def change(key: str, position: int, **changes: Any) -> Content:
    values = content(annotation(1))
    entries = [*values[key], *([{}] * (position + 1 - len(values[key])))]
    entries[position] = {**entries[position], **changes}
    return {**values, key: entries}


WRONG_LISTS = {
    "image id twice": (change("images", 1, id=7), "image 7: a second image of this id"),
    "no file name": (change("images", 0, file_name=""), "image 7: expected a file_name"),
    "no size": (change("images", 0, width=None), "image 7: expected its height and width"),
    "size of 0": (change("images", 0, height=0), "image 7: expected its height and width"),
    "category id twice": (change("categories", 0, id=3), "category 3: a second category of this id"),
    "name twice": (change("categories", 0, name="dog"), "category 3: a second category called 'dog'"),
    "no name": (change("categories", 0, name=None), "category 90: expected a name"),
    "no images": ({**content(), "images": []}, "no images in it"),
    "no categories": ({**content(), "categories": []}, "no categories in it"),
    "an image as text": ({**content(), "images": ["seven.png"]}, r"images\[0\]: expected an object"),
    "no masks": (content(annotation(1, segmentation=[])), "no annotation has an outline .* learns masks"),
    "results": ([{"image_id": 7, "score": 0.5}], "a list of results, which are predictions; expected COCO's"),
    "a list": ([], "a list; expected COCO's instance format"),
    "a number": (3, "int instead of an object"),
    "LabelMe": ({"shapes": [], "imagePath": "x.png"}, "a file of LabelMe"),
    "without annotations": ({"images": [], "categories": []}, "no list 'annotations' in it"),
    "captions": ({**content(), "annotations": [{"id": 1, "image_id": 7, "caption": "a cat"}]}, "captions"),
    "panoptic": (
        {**content(), "annotations": [{"image_id": 7, "segments_info": []}]},
        "panoptic annotations",
    ),
}


@pytest.mark.parametrize(("values", "message"), WRONG_LISTS.values(), ids=WRONG_LISTS)
def test_wrong_files_are_refused(opened: Callable[..., CocoImages], values: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"instances\.json: {message}"):
        opened(values)


@pytest.mark.parametrize("text", [b"", b"\xff\xd8 a JPEG", b'{"images": [', b"[" * 100_000])
def test_files_that_are_not_json_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(DataError, match=r"a\.json: not JSON, or a truncated file"):
        read_instances(tmp_path / "a.json")


def test_missing_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train2017: no such folder of images"):
        CocoSection(root=str(tmp_path)).open("train")
    (tmp_path / "val2017").mkdir()
    with pytest.raises(DataError, match=r"annotations/instances_val2017\.json: no such annotation file"):
        CocoSection(root=str(tmp_path)).without_training_split().open("train")


def test_missing_and_damaged_images_name_file_and_id(
    opened: Callable[..., CocoImages], tmp_path: Path
) -> None:
    source = opened(content(annotation(1)))
    (tmp_path / "seven.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"seven\.png: not an image.*\(image 7 of .*instances\.json\)"):
        source.load(0)
    (tmp_path / "seven.png").unlink()
    with pytest.raises(DataError, match=r"seven\.png: no such image \(image 7 of .*instances\.json\)"):
        source.load(0)


def test_an_image_of_another_size_is_refused(opened: Callable[..., CocoImages], tmp_path: Path) -> None:
    source = opened(content(annotation(1)))
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(tmp_path / "seven.png")
    with pytest.raises(DataError, match=r"\(image 7 of .*\): the image has 40×31 pixels, .* for 40×30"):
        source.load(0)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1"])
def test_images_of_other_modes(opened: Callable[..., CocoImages], tmp_path: Path, mode: str) -> None:
    source = opened({**content(annotation(1)), "images": [{**content()["images"][0], "file_name": "a.tif"}]})
    Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255)).convert(mode).save(tmp_path / "a.tif")
    image, _ = source.load(0)
    assert image.mode == "RGB"
    assert np.asarray(image).min() >= 254


def test_deep_images_and_other_channels(opened: Callable[..., CocoImages], tmp_path: Path) -> None:
    source = opened(content(annotation(1)))
    Image.fromarray(np.full((HEIGHT, WIDTH), 13107, dtype=np.uint16)).save(tmp_path / "seven.png")
    assert np.asarray(source.load(0)[0]).max() == 51
    source.decoding = Decoding(1, float_images=True)
    assert torch.equal(source.load(0)[0], torch.full((1, HEIGHT, WIDTH), 0.2))
    source.decoding = Decoding(5)
    with pytest.raises(DataError, match="1 channels, and the model takes 5"):
        source.load(0)


def marked() -> np.ndarray:
    """An image without symmetry: a rectangle off the middle."""
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[4:9, 6:20] = 255
    return pixels


def orientation_after_the_pixels(file: Path) -> None:
    """Move a PNG's chunk eXIf behind its pixels, where it is allowed too."""
    content, chunks, place = file.read_bytes(), [], 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        chunks.append(content[place:end])
        place = end
    chunks.sort(key=lambda chunk: (chunk[4:8] == b"IEND", chunk[4:8] == b"eXIf"))  # others keep their order
    file.write_bytes(content[:8] + b"".join(chunks))


@pytest.mark.parametrize("suffix", ["png", "late.png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_and_masks_are_turned_with_the_image(
    opened: Callable[..., CocoImages], tmp_path: Path, orientation: int, suffix: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(marked()).convert("RGB").save(tmp_path / f"a.{suffix}", exif=exif)
    if suffix == "late.png":
        orientation_after_the_pixels(tmp_path / "a.late.png")
    turned = orientation >= 5

    def objects_are_on_the_mark(values: Content) -> None:
        image, objects = opened(values).load(0)
        mark = np.asarray(image)[:, :, 0] > 0
        assert objects.size == mark.shape == ((WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH))
        assert np.array_equal(objects.decoded_masks()[0].numpy() > 0, mark)
        rows, columns = np.flatnonzero(mark.any(1)), np.flatnonzero(mark.any(0))
        expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert objects.boxes.tolist() == [expected]

    polygon = [6, 4, 20, 4, 20, 9, 6, 9]
    values = content(annotation(1, bbox=[6, 4, 14, 5], segmentation=[polygon]))
    values["images"][0]["file_name"] = f"a.{suffix}"
    objects_are_on_the_mark(values)
    if turned:  # annotated on the upright image
        upright = turned_pixels(marked(), orientation) > 0
        box = turned_boxes(torch.tensor([[6.0, 4, 20, 9]]), (HEIGHT, WIDTH), orientation)[0].tolist()
        code = {"size": [WIDTH, HEIGHT], "counts": _runs(upright)}
        bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
        values = content(annotation(1, bbox=bbox, segmentation=code))
        values["images"][0] |= {"file_name": f"a.{suffix}", "width": HEIGHT, "height": WIDTH}
        objects_are_on_the_mark(values)


def test_classes_of_a_model(opened: Callable[..., CocoImages]) -> None:
    source = opened(content(annotation(1), annotation(2, category_id=90)))
    source.use_classes(["bird", "cat", "dog"])
    assert source.target(0).labels.tolist() == [2, 1]
    assert source.classes == ["bird", "cat", "dog"]
    assert source.category_ids == [91, 90, 3]
    source = opened(content(annotation(1)))
    with pytest.raises(DataError, match=r"not the model's 1 class; not expected 'dog'"):
        source.use_classes(["cat"])
    source.use_classes(["dog"])  # there is no cat on an image
    assert source.target(0).labels.tolist() == [0]


def test_empty_classes_are_logged(
    opened: Callable[..., CocoImages], caplog: pytest.LogCaptureFixture
) -> None:
    opened(content(annotation(1))).report_empty_classes()
    assert "no objects of 1 of 2 classes: 'cat'" in caplog.text
    caplog.clear()
    source = opened(content(annotation(1)))
    source.use_classes(["bird", "cat", "dog"])
    source.report_empty_classes()
    assert "no objects of 2 of 3 classes: 'bird', 'cat'" in caplog.text


@pytest.mark.skipif(IMAGES_OF_COCO is None, reason="the 200 images of COCO are not here")
@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_of_coco_are_pycocotools_own(split: str) -> None:
    folder = cast(Path, IMAGES_OF_COCO)
    path = folder / f"instances_{split}.json"
    source = CocoImages(folder / "images" / split, path)
    reader = COCO(str(path))
    assert len(source) == 100
    assert source._all.outlines.values.dtype == np.uint16  # the compact form
    for index in range(len(source)):
        objects = source.target(index)
        expected = reader.loadAnns(reader.getAnnIds(imgIds=[objects.image_id]))
        assert objects.ids == [entry["id"] for entry in expected]
        assert objects.masks == [reader.annToRLE(entry) for entry in expected]
        assert [source.category_ids[n] for n in objects.labels] == [e["category_id"] for e in expected]
