"""Images in tars: the same as unpacked, and damage is reported."""

import multiprocessing
import os
import pickle
import tarfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from images import COLOURS, make_folder
from vmamba.data import Decoding, ImageFolder, TarImages, write_tar
from vmamba.data import tar_index as tar
from vmamba.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_folder(tmp_path)


def pack(folder: Path, name: str = "train.tar", inside: str = ".", mode: Any = "w") -> Path:
    """A tar of a folder, its files in an order of no meaning."""
    path = folder.parent / name
    with tarfile.open(path, mode) as packed:
        for file in sorted(folder.rglob("*"), key=lambda file: file.name[::-1]):
            packed.add(file, Path(inside) / file.relative_to(folder), recursive=False)
    return path


def add(path: Path, name: str, content: bytes = b"") -> None:
    with tarfile.open(path, "a") as packed:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        packed.addfile(member, BytesIO(content))


@pytest.mark.parametrize("inside", [".", "train", "data/train"])
def test_a_tar_is_what_it_is_unpacked(root: Path, inside: str) -> None:
    (root / "train" / "red" / "a b").mkdir()
    (root / "train" / "red" / "0.png").rename(root / "train" / "red" / "a b" / "ü.png")
    (root / "train" / "red" / "a").mkdir()
    (root / "train" / "red" / "1.png").rename(root / "train" / "red" / "a" / "z.png")
    for name in ("blue", "red"):  # a folder in common that is no common parent
        (root / "train" / name / "same").mkdir()
        (root / "train" / name / "2.png").rename(root / "train" / name / "same" / "0.png")
    (root / "train" / "red" / "notes.txt").write_text("no image")
    (root / "train" / "red" / "._0.png").write_bytes(b"what macOS leaves behind")
    folder, packed = ImageFolder(root / "train"), TarImages(pack(root / "train", inside=inside))
    assert packed.classes == folder.classes == sorted(COLOURS)
    assert len(packed) == len(folder) == 18
    for index in range(18):
        (image, label), (expected, expected_label) = packed.load(index), folder.load(index)
        assert label == expected_label
        assert image.tobytes() == expected.tobytes()
        name = Path(folder.name(index)).relative_to(root / "train")
        assert packed.name(index) == str(root / "train.tar" / inside / name)
    assert TarImages(root / "train.tar", Decoding(channels=1)).load(0)[0].mode == "L"


def test_classes_of_nested_folders_alone(root: Path) -> None:
    for name in COLOURS:
        (root / "train" / name).rename(root / name)
        (root / "train" / name).mkdir()
        (root / name).rename(root / "train" / name / "same")
    assert TarImages(pack(root / "train")).classes == ImageFolder(root / "train").classes == sorted(COLOURS)


def test_one_class_alone(root: Path) -> None:
    assert TarImages(pack(root / "train" / "red", inside="train/red")).classes == ["red"]


def content(source: TarImages) -> bytes:
    return source.load(3)[0].tobytes()


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_other_processes_read_too(root: Path, start: str) -> None:
    if start not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this system")
    source = TarImages(pack(root / "train"))
    expected = content(source)  # opens the tar
    assert b"_lock" not in pickle.dumps(source)
    if start == "fork":  # a pool's threads would be forked too
        read, write = os.pipe()
        if not os.fork():
            os.write(write, content(source))
            os._exit(0)
        os.wait()
        assert os.read(read, 10_000) == expected
        os.close(read)
        os.close(write)
    else:
        with multiprocessing.get_context(start).Pool(1) as pool:
            assert pool.apply(content, (source,)) == expected


def test_few_descriptors_serve_many_tars(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "_MAX_OPEN_TARS", 2)
    paths = [pack(root / "train" / name, f"{name}.tar") for name in COLOURS]
    index = tar.index_tars(paths)
    reader = tar.TarReader(index)
    for number in [0, 6, 12, 1, 13, 7]:
        expected = root / "train" / paths[index.tar[number]].stem / index.names[number]
        assert reader.read(number) == expected.read_bytes()
    assert len(reader._open) == 2


def test_the_index_is_kept_till_the_tar_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(root / "train")
    TarImages(path)
    assert not list(path.parent.glob(".*"))  # not of a few files
    monkeypatch.setattr(tar, "CACHED_FROM", 1)
    before = TarImages(path)
    (kept,) = path.parent.glob(".*")
    assert kept.name == ".train.tar.index.npz"
    with monkeypatch.context() as patch:
        patch.setattr(tar, "_members", None)  # nothing is read anew
        again = TarImages(path)
    assert [again.name(i) for i in range(18)] == [before.name(i) for i in range(18)]
    assert content(again) == content(before)
    for damage in (kept.read_bytes()[:200], b""):
        kept.write_bytes(damage)
        assert content(TarImages(path)) == content(before)
    add(path, "red/new.png", bytes(20_000))
    assert len(TarImages(path)) == 19
    assert list(path.parent.glob(".*")) == [kept]
    with pytest.raises(DataError, match=r"train\.tar: changed its size since it was indexed"):
        tar.TarReader(before.reader.index).read(0)


def test_a_folder_that_cannot_be_written_to(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError

    path = pack(root / "train")
    monkeypatch.setattr(tar, "CACHED_FROM", 1)
    monkeypatch.setattr(os, "replace", refuse)
    assert len(TarImages(path)) == 18
    assert not list(path.parent.glob(".*"))


def test_what_is_no_tar_of_images(root: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tar: cannot read the tar \(No such file"):
        TarImages(root / "none.tar")
    with pytest.raises(DataError, match=r"train: not a tar, or a damaged one"):
        TarImages(root / "train")
    with pytest.raises(DataError, match=r"0\.png: not a tar, or a damaged one"):
        TarImages(root / "train" / "red" / "0.png")
    for mode, name in (("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")):
        with pytest.raises(DataError, match=f"compressed with {name}"):
            TarImages(pack(root / "train", mode=mode))
    path = pack(root / "train")
    add(path, "other/x.png/notes.txt")
    add(path, "top.png")
    with pytest.raises(DataError, match=r"train\.tar: top\.png lies in no class folder"):
        TarImages(path)
    with tarfile.open(path, "w") as packed:
        packed.addfile(tarfile.TarInfo("red/notes.txt"))
    with pytest.raises(DataError, match="no images in it"):
        TarImages(path)
    with tarfile.open(path, "w") as packed:
        link = tarfile.TarInfo("red/0.png")
        link.type = tarfile.SYMTYPE
        packed.addfile(link)
    with pytest.raises(DataError, match=r"red/0\.png is a link"):
        TarImages(path)


def test_a_damaged_tar_is_told_wherever_it_is_cut_or_changed(root: Path) -> None:
    """Or the index is that of the whole one: a tar has a checksum of its headers alone."""
    path = pack(root / "train")
    whole = path.read_bytes()
    expected = tar.index_tars([path])
    end = 512 + int(expected.offsets[-1] + expected.sizes[-1] + 511) // 512 * 512 - 512
    for cut in [0, 1, 511, 512, 1000, *range(2048, end, 1777), end]:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"train\.tar: (damaged or cut short|not a tar)"):
            tar.index_tars([path])
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="were two tars joined"):
        tar.index_tars([path])
    random = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(whole)
        for place in random.integers(end, size=4):
            changed[place] = random.integers(256)
        path.write_bytes(changed)
        with suppress(DataError):
            found = tar.index_tars([path])
            assert list(found.names) == list(expected.names)
            assert found.offsets.tolist() == expected.offsets.tolist()


def test_a_tar_that_ends_in_an_image(root: Path) -> None:
    source = TarImages(pack(root / "train"))
    source.reader.index.sizes[:] = 2**20
    with pytest.raises(DataError, match=r"red/.*\.png: the tar ends in it"):
        source.load(17)


def test_a_written_tar_is_the_folder(root: Path) -> None:
    assert write_tar(root / "train", root / "packed.tar") == 18
    before = (root / "packed.tar").read_bytes()
    folder, packed = ImageFolder(root / "train"), TarImages(root / "packed.tar")
    assert packed.classes == folder.classes
    for index in range(18):
        assert packed.load(index)[0].tobytes() == folder.load(index)[0].tobytes()
    for index in range(18):
        os.utime(folder.path(index), (1, 1))
    write_tar(root / "train", root / "packed.tar")
    assert (root / "packed.tar").read_bytes() == before
    with pytest.raises(DataError, match=r"cannot write .*packed\.tar/new\.tar"):
        write_tar(root / "train", root / "packed.tar" / "new.tar")
    folder.path(0).unlink()
    folder.path(0).symlink_to(root / "nowhere")
    with pytest.raises(DataError, match=r"0\.png: cannot write"):
        write_tar(root / "train", root / "new.tar")
    assert not list(root.glob("new.tar*"))
