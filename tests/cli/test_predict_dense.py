"""`vmamba predict` of objects, of classes of pixels, and of videos."""

import csv
import json
import os
import shutil
import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import timm
from PIL import Image
from pycocotools.coco import COCO
from torch import nn

from dense_models import detector, mmdet_file, segmenter
from images import COLOURS, make_folder
from predicting import Done, predict
from vmamba import dense_inference
from vmamba.data.names import ADE20K_CLASSES, COCO_CLASSES
from vmamba.data.overlay import colour
from vmamba.data.preprocessing import Preprocessing
from vmamba.data.video import Video, writing_video
from vmamba.heads import mmdet_names, restoring
from vmamba.heads.upernet import mmseg_names
from vmamba.pretrained import model_config, save_pretrained
from vmamba_cli._predictions import Input, output_names

MODEL = ("--model", "test_convnext2", "--device", "cpu")
DETECT = ("--checkpoint", "det.pth", *MODEL, "--min-score", "0.05")
SEGMENT = ("--checkpoint", "seg.pth", *MODEL)
CLASSIFY = ("--checkpoint", "model")
SIZE = (64, 48)


def shade(number: int) -> tuple[int, int, int]:
    """The colour of a frame."""
    return (40 + 40 * number, 200 - 30 * number, 100)


def write_clip(path: Path, frames: int = 5, times: list[float] | None = None) -> Path:
    """A video of 25 frames a second, of one colour each but for a white stripe on the left."""
    with writing_video(path, SIZE, Fraction(25), Fraction(1, 12800)) as write:
        for number in range(frames):
            image = Image.new("RGB", SIZE, shade(number % 5))
            image.paste((255, 255, 255), (0, 0, 16, 48))
            write(image, number / 25 if times is None else times[number])
    return path


def turn_right(path: Path) -> None:
    """Say in an MP4 file that its video is shown turned by a quarter, as phones do."""
    content = bytearray(path.read_bytes())
    start = content.find(b"tkhd") + 44  # of the display matrix
    content[start : start + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, SIZE[1] << 16, 0, 1 << 30)
    path.write_bytes(content)


def read(path: Path) -> list[tuple[float, Image.Image]]:
    with Video(path) as video:
        return [(frame.seconds, frame.image) for frame in video]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "photos", each=1)
    mmdet_file(place / "det.pth", detector("test_convnext2", 81, min_size=64), mmdet_names)
    mmdet_file(place / "seg.pth", segmenter(150, "test_convnext2"), mmseg_names)
    classifier = timm.create_model("test_resnet", num_classes=3)
    config = model_config(classifier, Preprocessing(size=(32, 32)), sorted(COLOURS))
    save_pretrained(place / "model", classifier, config)
    write_clip(place / "clip.mp4")
    return place


@pytest.fixture(autouse=True)
def small_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images go through the models at the side of 64, since 800 and 512 take seconds, with few regions."""
    made = restoring.mask_rcnn
    settings = {"min_size": 64, "proposals": 40, "detections": 6}
    monkeypatch.setattr(restoring, "mask_rcnn", lambda *args, **more: made(*args, **more, **settings))
    defaults = dense_inference.SegmentationPredictor.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "base_size", (64, 128))


IMAGES = [f"photos/val/{name}/0.png" for name in sorted(COLOURS)]


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def assert_done(done: Done) -> None:
    assert done.status == 0, done.stderr


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' decode
def test_a_folder_of_objects(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = predict(place, "photos/val", *DETECT, "--out", str(out), "--json")
    assert_done(done)
    assert "3 images, 80 classes, cpu" in done.stderr
    overlays = [f"overlays/{name}/0.png" for name in sorted(COLOURS)]
    assert files_in(out) == [*overlays, "predictions.json"]
    for name in overlays:
        with Image.open(out / name) as drawn:
            assert min(drawn.size) > 200  # enlarged, and with the legend below

    printed = json.loads(done.stdout)
    assert sum(len(each["objects"]) for each in printed) > 3
    data = COCO(str(out / "predictions.json"))
    images = data.loadImgs(data.getImgIds())
    assert [image["file_name"] for image in images] == [each["image"] for each in printed] == IMAGES
    assert [image["overlay"] for image in images] == overlays
    assert [(image["height"], image["width"]) for image in images] == [(16, 20)] * 3
    assert [category["name"] for category in data.loadCats(data.getCatIds())] == list(COCO_CLASSES)
    for image, each in zip(images, printed, strict=True):
        annotations = data.loadAnns(data.getAnnIds(image["id"]))
        assert [a["score"] for a in annotations] == [o["score"] for o in each["objects"]]
        assert [a["category_id"] for a in annotations] == [o["category"] for o in each["objects"]]
        for annotation, thing in zip(annotations, each["objects"], strict=True):
            x, y, width, height = annotation["bbox"]
            assert [x, y, x + width, y + height] == pytest.approx(thing["box"])
            mask = data.annToMask(annotation)
            assert mask.shape == (16, 20)
            assert mask.sum() == annotation["area"]
            assert data.cats[thing["category"]]["name"] == thing["label"]


def test_tables_of_objects(place: Path, tmp_path: Path) -> None:
    options = (*IMAGES[:2], *DETECT, "--top", "2")
    for name in ("a.json", "a.jsonl", "a.csv", "a.png"):
        done = predict(place, *options, "--out", str(tmp_path / name))
        assert_done(done)
    data = COCO(str(tmp_path / "a.json"))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [len(each["objects"]) for each in lines] == [2, 2]
    assert len(data.getAnnIds()) == 4
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["image"] for row in rows] == [name for name in IMAGES[:2] for _ in range(2)]
    expected = [thing for each in lines for thing in each["objects"]]
    for row, thing in zip(rows, expected, strict=True):
        assert row["label"] == thing["label"]
        assert float(row["score"]) == pytest.approx(thing["score"], abs=1e-6)
        assert [float(row[side]) for side in ("x1", "y1", "x2", "y2")] == pytest.approx(
            thing["box"], abs=0.01
        )
    with Image.open(tmp_path / "a.png") as sheet:
        assert min(sheet.size) > 200


def test_images_without_objects_are_not_lost(place: Path, tmp_path: Path) -> None:
    options = (IMAGES[0], *DETECT[:-1], "1")
    done = predict(place, *options, "--out", str(tmp_path / "a.csv"))
    assert done.stdout == f"{IMAGES[0]}: nothing\n"
    (row,) = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert (row["image"], row["label"]) == (IMAGES[0], "")
    assert_done(predict(place, *options, "--out", str(tmp_path / "out")))
    data = COCO(str(tmp_path / "out" / "predictions.json"))
    assert len(data.getImgIds()) == 1
    assert data.getAnnIds() == []


def test_a_folder_of_segmentations(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = predict(place, "photos/val/*/0.png", *SEGMENT, "--out", str(out), "--json")
    assert_done(done)
    names = [f"{name}/0.png" for name in sorted(COLOURS)]
    expected = [f"{folder}/{name}" for folder in ("masks", "overlays") for name in names]
    assert files_in(out) == ["classes.json", *expected]
    listed = json.loads((out / "classes.json").read_text())
    assert [each["name"] for each in listed["classes"]] == list(ADE20K_CLASSES)
    assert [each["mask"] for each in listed["images"]] == [f"masks/{name}" for name in names]
    assert [each["overlay"] for each in listed["images"]] == [f"overlays/{name}" for name in names]
    printed = json.loads(done.stdout)
    for each, record in zip(printed, listed["images"], strict=True):
        assert record["image"] == each["image"]
        assert record["classes"] == each["classes"]
        with Image.open(out / record["mask"]) as mask:
            assert (mask.mode, mask.size) == ("P", (20, 16))
            labels = np.asarray(mask)
            shown = mask.convert("RGB").getpixel((3, 3))
        best = each["classes"][0]
        assert np.mean(labels == best["number"]) == best["share"]
        assert ADE20K_CLASSES[best["number"]] == best["label"]
        assert shown == colour(int(labels[3, 3])) == tuple(listed["classes"][labels[3, 3]]["colour"])
    done = predict(place, IMAGES[0], *SEGMENT, "--out", str(tmp_path / "a.csv"))
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-4)
    assert len(rows) == len(printed[0]["classes"]) > 1


def test_no_two_images_share_a_file() -> None:
    names = ["a.jpg", "a.png", "A.tif", "b/a.jpg", "a-2.jpg", "a.jpg", "b.mp4", "c.jpg", "c/1.jpg"]
    given = [Input(f"somewhere/{name}", name) for name in names]
    assert list(output_names(given).values()) == ["a", "a-2", "A-3", "b/a", "a-2-2", "a-4", "b-2", "c", "c/1"]


def test_pictures_are_no_images_of_the_next_call(place: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(place / "photos" / "val", photos)
    for _ in range(2):
        done = predict(tmp_path, "photos", *_absolute(place, DETECT), "--out", "photos", "--top", "1")
        assert_done(done)
        assert done.stdout.count("\n") == 3
    assert "photos: left out 3 images in it, which an earlier call wrote" in done.stderr
    assert (photos / "blue" / "0.png").read_bytes() == (place / IMAGES[0]).read_bytes()
    done = predict(tmp_path, "photos/overlays", *_absolute(place, DETECT), "--out", "photos")
    assert done.status == 2
    assert "--out photos: all images are in it" in done.stderr


def _absolute(place: Path, options: tuple[str, ...]) -> list[str]:
    return [str(place / option) if option.endswith(".pth") else option for option in options]


def test_a_damaged_image_has_no_picture(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((place / IMAGES[0]).read_bytes()[:50])
    for options, file in ((DETECT, "predictions.json"), (SEGMENT, "classes.json")):
        out = tmp_path / file.partition(".")[0]
        done = predict(place, str(broken), IMAGES[1], *options, "--out", str(out))
        assert done.status == 1
        assert f"vmamba: {broken}: not an image" in done.stderr
        assert [name for name in files_in(out) if name.startswith("overlays")] == ["overlays/0.png"]
        images = json.loads((out / file).read_text())["images"]
        assert [each.get("file_name", each.get("image")) for each in images][-1] == IMAGES[1]


def test_nan_in_a_segmentation_is_no_picture(place: Path, tmp_path: Path) -> None:
    model = segmenter(150, "test_convnext2")
    nn.init.constant_(model.decode_head.conv_seg.bias, float("nan"))
    path = mmdet_file(tmp_path / "nan.pth", model, mmseg_names)
    done = predict(place, "clip.mp4", "--checkpoint", str(path), *MODEL, "--out", str(tmp_path / "out"))
    assert done.status == 2
    assert "vmamba: clip.mp4, frame 0 (0.00 s): the model's outputs are NaN" in done.stderr
    assert files_in(tmp_path / "out") == ["classes.json", "predictions.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*CLASSIFY, "--out", "new"), "--out new: a folder of pictures is of detection and segmentation"),
        ((*CLASSIFY, "--out", "photos"), "and this model's task is classification; expected a name that"),
        ((*CLASSIFY, "--min-score", "0.5"), "--min-score: of detection, and this model's task is classif"),
        (
            (*SEGMENT, "--min-score", "0.5"),
            "--min-score: of detection, and this model's task is segmentation",
        ),
        ((*DETECT[:-1], "0.01"), "--min-score: expected 0.05 (the model gives no objects of a lower"),
        (
            (*DETECT, "--out", "det.pth"),
            "expected a name that ends in .csv, .json, .jsonl, .png, .jpg, .jpeg, or",
        ),
        ((*DETECT, "--out", "plain"), "--out plain: cannot be written (plain is in the way)"),
        ((*DETECT, "--out", "plain/below"), "plain is in the way)"),
        ((*CLASSIFY, "--every", "2"), "--every: of videos, and there is none among these images"),
    ],
)
def test_mistakes(options: tuple[str, ...], message: str, place: Path) -> None:
    (place / "plain").write_text("a file")
    done = predict(place, IMAGES[0], *options)
    assert (done.status, done.stdout) == (2, "")
    assert message in done.stderr
    assert not (place / "new").exists()


def test_a_video_of_objects(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = predict(place, "clip.mp4", IMAGES[0], *DETECT, "--out", str(out), "--top", "3")
    assert_done(done)
    assert "1 image, 1 video, 80 classes" in done.stderr
    assert done.stdout.startswith("clip.mp4, frame 0 (0.00 s): ")
    assert files_in(out) == ["overlays/0.png", "overlays/clip.mp4", "predictions.json", "predictions.jsonl"]
    frames = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [each["image"] for each in frames] == ["clip.mp4"] * 5
    assert [each["frame"] for each in frames] == [0, 1, 2, 3, 4]
    assert [each["seconds"] for each in frames] == [0, 0.04, 0.08, 0.12, 0.16]
    assert all(len(each["objects"]) == 3 for each in frames)
    drawn, given = read(out / "overlays" / "clip.mp4"), read(place / "clip.mp4")
    assert [(time, image.size) for time, image in drawn] == [(time, image.size) for time, image in given]
    assert all(
        np.any(np.abs(np.asarray(a) - np.asarray(b)) > 40)
        for (_, a), (_, b) in zip(drawn, given, strict=True)
    )
    with av.open(str(out / "overlays" / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert container.streams.video[0].average_rate == 25


def test_a_video_of_segmentations_every_other_frame(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = predict(place, "clip.mp4", *SEGMENT, "--out", str(out), "--every", "2", "--batch-size", "2")
    assert_done(done)
    masks = [f"masks/clip/{number:06}.png" for number in (0, 2, 4)]
    assert files_in(out) == ["classes.json", *masks, "overlays/clip.mp4", "predictions.jsonl"]
    assert [time for time, _ in read(out / "overlays" / "clip.mp4")] == pytest.approx([0, 0.08, 0.16])
    with Image.open(out / masks[1]) as mask:
        assert mask.size == SIZE


def test_a_video_of_classes(place: Path, tmp_path: Path) -> None:
    plain = predict(place, "clip.mp4", IMAGES[0], *CLASSIFY, "--json", "--out", str(tmp_path / "a.csv"))
    assert_done(plain)
    printed = json.loads(plain.stdout)
    assert [each.get("frame") for each in printed] == [0, 1, 2, 3, 4, None]
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [row["frame"] for row in rows] == ["0", "1", "2", "3", "4", ""]
    assert [row["label"] for row in rows] == [each["classes"][0]["label"] for each in printed]
    for name in ("a.json", "a.jsonl", "a.jpg"):
        assert_done(predict(place, "clip.mp4", *CLASSIFY, "--out", str(tmp_path / name)))
    assert json.loads((tmp_path / "a.json").read_text()) == printed[:5]
    with Image.open(tmp_path / "a.jpg") as sheet:
        assert min(sheet.size) > 200
    for number, (_, image) in enumerate(read(place / "clip.mp4")):
        assert np.allclose(image.getpixel((40, 20)), shade(number), atol=8)
        assert np.allclose(image.getpixel((5, 20)), (255, 255, 255), atol=8)


def test_videos_are_upright(place: Path, tmp_path: Path) -> None:
    turned = Path(shutil.copy(place / "clip.mp4", tmp_path / "turned.mp4"))
    turn_right(turned)
    _, image = read(turned)[0]
    assert image.size == SIZE[::-1]
    assert np.allclose(image.getpixel((20, 5)), (255, 255, 255), atol=8)  # the stripe is now at the top
    assert np.allclose(image.getpixel((20, 50)), shade(0), atol=8)
    assert_done(predict(place, str(turned), *DETECT, "--out", str(tmp_path / "out")))
    assert read(tmp_path / "out" / "overlays" / "turned.mp4")[0][1].size == SIZE[::-1]


def test_the_times_of_a_variable_rate_are_kept(place: Path, tmp_path: Path) -> None:
    times = [0, 0.01, 0.1, 0.4, 0.43]
    write_clip(tmp_path / "phone.mp4", times=times)
    assert_done(predict(place, str(tmp_path / "phone.mp4"), *DETECT, "--out", str(tmp_path / "out")))
    assert [time for time, _ in read(tmp_path / "out" / "overlays" / "phone.mp4")] == pytest.approx(
        times, abs=1e-3
    )


@pytest.mark.parametrize("size", [(33, 21), (33, 20), (32, 21)])
def test_odd_sides_become_even(size: tuple[int, int], tmp_path: Path) -> None:
    """By a copy of the last column or row: browsers play no colours of half pixels, nor of every pixel."""
    path = tmp_path / "odd.mp4"
    with writing_video(path, size, Fraction(25), Fraction(1, 25)) as write:
        for number in range(2):
            write(Image.new("RGB", size, (200, 160, 120)), number / 25)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
    for _, image in read(path):
        assert image.size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
        assert abs(np.asarray(image).astype(int) - (200, 160, 120)).max() < 8


@pytest.fixture
def damaged(tmp_path: Path) -> dict[str, Path]:
    """Videos of 50 frames, of which some are lost."""
    whole = write_clip(tmp_path / "whole.mp4", frames=50).read_bytes()
    matroska = tmp_path / "cut.mkv"
    with av.open(str(tmp_path / "whole.mp4")) as source, av.open(str(matroska), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    matroska.write_bytes(matroska.read_bytes()[: -matroska.stat().st_size // 2])
    hole = bytearray(whole)
    middle = hole.find(b"mdat") + (hole.find(b"moov") - hole.find(b"mdat")) // 2
    hole[middle : middle + 400] = b"\x5a" * 400
    (tmp_path / "hole.mp4").write_bytes(hole)
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.mp4").write_text("no video")
    return {path.name: path for path in tmp_path.iterdir()}


def test_what_can_be_read_of_damaged_videos_is_kept(
    place: Path, damaged: dict[str, Path], tmp_path: Path
) -> None:
    for name, message in (
        ("cut.mkv", "cut.mkv: truncated, it ends after "),
        ("hole.mp4", "hole.mp4: damaged, "),
    ):
        out = tmp_path / f"of_{damaged[name].stem}"
        done = predict(
            place, str(damaged[name]), *SEGMENT, "--out", str(out), "--every", "5", "--batch-size", "3"
        )
        assert done.status == 1, done.stderr
        assert message in done.stderr
        frames = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        assert list(frames[-1]) == ["image", "error"]
        drawn = read(next((out / "overlays").iterdir()))
        assert 0 < len(drawn) == len(frames) - 1 < 11
        assert done.stdout.count("\n") == len(drawn)


def test_what_is_no_video(place: Path, damaged: dict[str, Path], tmp_path: Path) -> None:
    for name in ("half.mp4", "text.mp4"):
        done = predict(place, str(damaged[name]), IMAGES[0], *CLASSIFY)
        assert done.status == 1
        assert f"{name}: not a video, or a damaged one (Invalid data found" in done.stderr
        assert done.stdout.startswith(IMAGES[0])


@pytest.mark.skipif(os.name == "nt", reason="colons in names")
def test_a_name_with_a_colon_is_no_address(place: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(place / "clip.mp4", tmp_path / "10:30 http:.mp4"))
    assert len(read(path)) == 5


def test_without_pyav(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    done = predict(place, "clip.mp4", IMAGES[0], *CLASSIFY)
    assert done.status == 1
    assert "videos need PyAV" in done.stderr
    assert "pip install 'vmamba[video]'" in done.stderr


def test_no_half_written_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"as before")

    def interrupted() -> Any:
        with writing_video(path, SIZE, Fraction(25), Fraction(1, 25)) as write:
            write(Image.new("RGB", SIZE), 0.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [each.name for each in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"as before"
