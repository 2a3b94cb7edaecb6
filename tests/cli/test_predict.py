"""`vmamba predict` as a user calls it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image, ImageFont
from torch import nn

from images import COLOURS, make_folder
from predicting import Done, predict
from vmamba.data import fonts
from vmamba.data.contact_sheet import Cell, draw_sheet
from vmamba.data.preprocessing import Preprocessing
from vmamba.pretrained import model_config, save_pretrained

CLASSES = sorted(COLOURS)


def assert_refused(done: Done, message: str) -> None:
    assert done.status == 2
    assert done.stdout == ""
    assert done.stderr.startswith("vmamba: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/, nested and with hidden ones, and model/, which tells colours apart."""
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "photos", each=2)
    (place / "photos" / "val" / ".hidden").mkdir()
    (place / "photos" / "val" / ".hidden" / "a.png").write_bytes(b"not read")
    (place / "photos" / "val" / "notes.txt").write_text("not an image")

    model = timm.create_model("test_resnet", num_classes=3)
    save_pretrained(place / "model", model, model_config(model, Preprocessing(size=(32, 32)), CLASSES))
    return place


FILES = [f"photos/val/{name}/{number}.png" for name in CLASSES for number in range(2)]


def test_folders_globs_and_files_say_the_same(place: Path) -> None:
    by_file = predict(place, *FILES, "--checkpoint", "model")
    assert by_file.status == 0, by_file.stderr
    lines = by_file.stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == FILES
    assert all(label in line and "%" in line for line in lines for label in CLASSES)
    for where in ("photos/val", "photos/val/**/*.png", "photos/val/*/?.png"):
        done = predict(place, where, "--checkpoint", "model", "--batch-size", "4")
        assert (done.status, done.stdout) == (0, by_file.stdout), where
    assert (
        "left out hidden files or folders (1)" in predict(place, "photos/val", "--checkpoint", "model").stderr
    )
    assert "6 images, 3 classes, " in by_file.stderr


def test_json_and_tables_hold_the_same(place: Path, tmp_path: Path) -> None:
    printed = json.loads(predict(place, *FILES, "--checkpoint", "model", "--json", "--top", "2").stdout)
    assert [each["image"] for each in printed] == FILES
    assert all(len(each["classes"]) == 2 for each in printed)
    for name in ("a.json", "a.jsonl", "a.csv"):
        done = predict(
            place, *FILES, "--checkpoint", "model", "--top", "2", "--out", str(tmp_path / "new" / name)
        )
        assert done.status == 0, done.stderr
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == printed
    assert [json.loads(line) for line in (tmp_path / "new" / "a.jsonl").read_text().splitlines()] == printed
    with (tmp_path / "new" / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == FILES
    assert [row["label"] for row in rows] == [each["classes"][0]["label"] for each in printed]
    assert float(rows[0]["score"]) == pytest.approx(printed[0]["classes"][0]["score"], abs=1e-6)


def test_a_contact_sheet(place: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        done = predict(place, *FILES, "--checkpoint", "model", "--out", str(tmp_path / name))
        assert done.status == 0, done.stderr
        with Image.open(tmp_path / name) as sheet:
            sheet.load()
            assert sheet.format == {"a.png": "PNG", "b.jpg": "JPEG"}[name]
            assert min(sheet.size) > 300
            middle = sheet.convert("RGB").getpixel((98, 98))  # the first image, which is blue
            assert middle[2] > max(middle[:2])


def test_a_sheet_of_any_name(tmp_path: Path) -> None:
    image = Image.new("RGB", (10, 300), (200, 30, 30))
    names = [
        "a very long name of a class that does not fit",
        "a\nb",
        "\udcff.png",
        "$\\frac$",
        "狐",
        "café",
        "",
        "\\xff.png",
    ]
    draw_sheet([Cell(name, image, name, "100%") for name in names], tmp_path / "a.png")
    draw_sheet([Cell("a", None, "not an image")], tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as many, Image.open(tmp_path / "b.png") as one:
        assert many.width > one.width > 150


@pytest.mark.parametrize("size", [11, 14])
def test_a_sheet_writes_letters_as_letters(size: int) -> None:
    """With Matplotlib's font as they are, with Pillow's own without accents; never as numbers."""
    pytest.importorskip("matplotlib")
    font = fonts.font_of(size)
    for name in ("café à la carte.png", "Größe Ångström", "лиса ёж", "αλεπού", "a b\u00a0c"):
        assert fonts.drawable(name, font) == name
    assert fonts.drawable("cafe\u0301", font) == "café"
    assert fonts.drawable("狐", font) == "\\u72d0"
    plain = fonts.drawable("café à\u00a0la Ångström", ImageFont.load_default(size))
    assert "\\u" not in plain
    assert len(plain) == len("café à\u00a0la Ångström")


def test_a_damaged_image_does_not_lose_the_others(place: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((place / FILES[0]).read_bytes()[:50])
    out = tmp_path / "a.csv"
    done = predict(place, FILES[0], str(broken), FILES[1], "--checkpoint", "model", "--out", str(out))
    assert done.status == 1
    assert [line.partition(": ")[0] for line in done.stdout.splitlines()] == FILES[:2]
    assert f"vmamba: {broken}: not an image, or a damaged one" in done.stderr
    assert done.stderr.splitlines()[-1] == "vmamba: 1 of 3 images could not be judged"
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    done = predict(place, str(broken), "--checkpoint", "model", "--json", "--out", str(tmp_path / "a.png"))
    assert done.status == 2
    assert list(json.loads(done.stdout)[0]) == ["image", "error"]
    assert (tmp_path / "a.png").stat().st_size > 0


def test_nan_is_told_and_no_json(place: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    nn.init.constant_(model.fc.bias, float("nan"))
    save_pretrained(tmp_path, model, model_config(model, Preprocessing(size=(32, 32)), CLASSES))
    done = predict(place, FILES[0], "--checkpoint", str(tmp_path), "--json")
    assert done.status == 2
    assert "the model's outputs are NaN or infinite" in json.loads(done.stdout)[0]["error"]
    assert "nan" not in done.stdout.lower().replace("are nan or infinite", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FILES[0],), "what with? Give --checkpoint RUN, or --model"),
        (("none.png", "--checkpoint", "model"), "none.png: no such image or folder"),
        (("*.gif", "--checkpoint", "model"), "*.gif: no file has such a name"),
        (("model", "--checkpoint", "model"), "model: no images in this folder or below"),
        ((FILES[0], "--checkpoint", "none"), "none: no such checkpoint"),
        ((FILES[0], "--model", "vmamba_tny"), "did you mean vmamba_tiny"),
        ((FILES[0], "--checkpoint", "model", "--device", "cuda:77"), "device: 'cuda:77'"),
        ((FILES[0], "--checkpoint", "model", "--weights", "ema"), "has no 'ema' weights"),
        ((FILES[0], "--checkpoint", "model", "--out", "a.txt"), "expected a name that ends in .csv"),
        ((FILES[0], "--checkpoint", "model", "--out", "model.csv/a.csv"), "cannot be written"),
        ((FILES[0], "--checkpoint", "model", "--out", "folder.csv"), "cannot be written"),
        ((FILES[0], "--checkpoint", "model", "--out", "n" * 300 + ".csv"), "cannot be written"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str, place: Path) -> None:
    (place / "model.csv").write_text("a file")
    (place / "folder.csv").mkdir(exist_ok=True)
    done = predict(place, *arguments)
    lines = [
        line
        for line in done.stderr.splitlines()
        if "1 image, 3 classes" not in line and "left out" not in line
    ]
    assert_refused(Done(done.status, "", "\n".join(lines) + "\n"), message)


def call(place: Path, *arguments: Any, stdout: Any = subprocess.PIPE, **env: str) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "vmamba_cli", "predict", *arguments, "--checkpoint", "model"],
        cwd=place,
        env={**os.environ, **env},
        stdout=stdout,
        stderr=subprocess.PIPE,
        check=False,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names that are bytes, and /dev/full")
def test_odd_names_narrow_terminals_and_full_disks(place: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xffcaf\xc3\xa9.png"
    with open(odd, "wb") as file:
        file.write((place / FILES[0]).read_bytes())
    done = call(place, odd, "--out", tmp_path / "a.csv", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"\\xffcaf\\xe9.png: " in done.stdout
    assert "\\xffcafé.png" in (tmp_path / "a.csv").read_text(encoding="utf-8")
    with open("/dev/full", "w") as full:
        done = call(place, *FILES, stdout=full)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == b"vmamba: the output cannot be written (No space left on device)"
    refused = predict(place, FILES[0], "--checkpoint", "model", "--out", "/dev/full")
    assert "cannot be written (/dev/full is in the way)" in refused.stderr


def test_the_authors_weights(place: Path, tmp_path: Path) -> None:
    from authors import authors_names

    path = tmp_path / "vssm.pth"
    torch.save({"model": authors_names(timm.create_model("vmamba_pico").state_dict())}, path)
    done = predict(
        place, FILES[0], "--checkpoint", str(path), "--model", "vmamba_pico", "--precision", "bfloat16"
    )
    assert done.status == 0, done.stderr
    assert "1,000 classes" in done.stderr
    assert done.stdout.count("%") == 5
