"""What of a folder or a tar is a sample, and what is left out and said to be."""

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vmamba.data import ImageFolder, TarImages, write_tar
from vmamba.data.finding import LeftOut, find_images
from vmamba.errors import DataError

HIDDEN = "hidden files or folders"


def put(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(path, format="png")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of one image each."""
    for name in ("a", "b"):
        put(tmp_path / "images" / name / "0.png")
    return tmp_path / "images"


def pack(root: Path) -> Path:
    path = root.with_suffix(".tar")
    with tarfile.open(path, "w", dereference=True) as tar:
        tar.add(root, "images")
    return path


def names(source: Any) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def test_hidden_parts_and_other_files_are_left_out_and_counted(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(root / "a" / ".ipynb_checkpoints" / "0-checkpoint.png")
    put(root / "a" / "deep" / ".thumbs" / "deeper" / "0.png")
    put(root / "a" / "._0.png")
    put(root / ".trash" / "0.png")
    (root / "a" / "labels.txt").touch()
    (root / "a" / "deep" / "data.csv").touch()
    (root / "readme").touch()
    for source in (ImageFolder(root), TarImages(pack(root))):
        assert names(source) == ["a/0.png", "b/0.png"]
        assert source.classes == ["a", "b"]
    folder, tar = [record.getMessage() for record in caplog.records]
    assert folder == (
        f"{root}: left out {HIDDEN} (4), files outside of class folders (1), "
        "files that are no images by their suffix (2: .txt, .csv)"
    )
    assert f"{root}.tar: left out " in tar
    assert f"{HIDDEN} (4)" in tar
    assert "files that are no images by their suffix (3: " in tar


def test_a_clean_folder_says_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    ImageFolder(root)
    TarImages(pack(root))
    assert not caplog.records


def test_a_tar_below_a_hidden_folder(root: Path) -> None:
    with tarfile.open(root.parent / "hidden.tar", "w") as tar:
        tar.add(root, ".cache/images")
    assert names(TarImages(root.parent / "hidden.tar")) == ["a/0.png", "b/0.png"]


@pytest.mark.parametrize("suffix", ["jfif", "JPE", "gif", "ppm", "pgm", "tga", "TIFF", "mpo"])
def test_every_suffix_that_pillow_reads(suffix: str, root: Path) -> None:
    path = root / "b" / f"1.{suffix}"
    image = Image.new("L" if suffix == "pgm" else "RGB", (4, 4))
    image.save(path, format={"JFIF": "JPEG", "JPE": "JPEG", "PGM": "PPM", "MPO": "JPEG"}.get(suffix.upper()))
    for source in (ImageFolder(root), TarImages(pack(root))):
        assert names(source)[-1] == f"b/1.{suffix}"
        assert source.load(2)[0].size == (4, 4)


def test_links_to_files_and_folders_are_followed(root: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "deep" / "1.png")
    (root / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "2.png").symlink_to(root / "b" / "0.png")
    (root / "c").symlink_to(tmp_path / "elsewhere")
    assert names(ImageFolder(root)) == [
        "a/0.png",
        "a/2.png",
        "a/linked/deep/1.png",
        "b/0.png",
        "c/deep/1.png",
    ]


def test_loops_of_links(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "a" / "up").symlink_to(root / "a")
    put(root / "a" / "x" / "1.png")
    put(root / "a" / "y" / "2.png")
    (root / "a" / "x" / "to_y").symlink_to(root / "a" / "y")
    (root / "a" / "y" / "to_x").symlink_to(root / "a" / "x")
    (root / "a" / "self").symlink_to(root / "a" / "self")
    assert names(ImageFolder(root)) == ["a/0.png", "a/x/1.png", "a/y/2.png", "b/0.png"]
    assert "links to folders that are read already (3)" in caplog.text


def test_what_is_no_regular_file(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "folder.png").mkdir()
    (root / "a" / "gone.png").symlink_to(root / "nowhere")
    source = ImageFolder(root)
    assert names(source) == ["a/0.png", "a/gone.png", "b/0.png"]
    assert "entries that are no regular files (1)" in caplog.text
    with pytest.raises(DataError, match=r"gone\.png: no such image"):
        source.load(1)


@pytest.mark.parametrize("unreadable", ["images", "images/a", "images/a/deep"])
def test_a_folder_that_cannot_be_read(unreadable: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(root / "a" / "deep" / "1.png")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == root.parent / unreadable:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=rf"{unreadable}/?: cannot read the folder \(Permission denied\)"):
        ImageFolder(root)


def test_names_that_are_not_utf8(root: Path, tmp_path: Path) -> None:
    raw = os.fsencode(root)
    os.mkdir(raw + b"/caf\xe9")
    put(root / "c" / "0.png")
    os.rename(raw + b"/c/0.png", raw + b"/caf\xe9/\xff.png")
    os.rmdir(root / "c")
    write_tar(root, tmp_path / "packed.tar")
    for source in (ImageFolder(root), TarImages(pack(root)), TarImages(tmp_path / "packed.tar")):
        assert source.classes == ["a", "b", "caf\\xe9"]
        assert names(source)[2] == os.fsdecode(b"caf\xe9/\xff.png")
        assert source.name(2).endswith("caf\\xe9/\\xff.png")
        source.name(2).encode()
        assert source.load(2)[1] == 2
    with open(raw + b"/caf\xe9/\xff.png", "wb"):
        pass
    with pytest.raises(DataError, match=r"caf\\xe9/\\xff\.png: not an image"):
        ImageFolder(root).load(2)
    os.mkdir(raw + b"/caf\\xe9")
    put(root / "caf\\xe9" / "0.png")
    with pytest.raises(DataError, match="two class folders are both called"):
        ImageFolder(root)


def test_the_order_of_folders_and_tars_is_the_same(root: Path) -> None:
    for name in ("a b/1.png", "a/z/1.png", "a/ä.png", "a-/1.png", "a/z.png", "a/z-.png", "Ω/1.png"):
        put(root / "a" / name)
    found = find_images(str(root / "a"), LeftOut())
    assert found == [str(path) for path in sorted(map(Path, found))]  # as pathlib orders them
    assert names(ImageFolder(root)) == names(TarImages(pack(root)))
