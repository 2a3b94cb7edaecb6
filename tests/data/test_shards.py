"""WebDataset shards: the same samples from a folder, from shards on a disk and from object storage."""

import json
import os
import tarfile
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from images import COLOURS, make_folder, tiny_values
from vmamba.data import (
    ClassificationDataset,
    EpochSampler,
    ImageFolder,
    RemoteShards,
    ResumableLoader,
    SampleGroups,
    Shards,
    find_shards,
    read_classes,
    write_shards,
)
from vmamba.data.sources.webdataset import expand_braces
from vmamba.data.storage import download
from vmamba.errors import DataError, RecipeError
from vmamba.train.recipe import check, override_values
from vmamba.train.run import train
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask

fsspec = pytest.importorskip("fsspec")
NAMES = sorted(COLOURS)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """18 + 18 samples in shards of 4."""
    make_folder(tmp_path / "images")
    for split in ("train", "val"):
        assert write_shards(tmp_path / "images" / split, tmp_path / "packed", split, samples=4) == 5
    return tmp_path / "packed"


@pytest.fixture
def bucket(packed: Path) -> Iterator[str]:
    """The same in a storage, with the number of times that each file was fetched in `fetched`."""
    storage = fsspec.filesystem("memory")
    storage.put(str(packed), "/bucket", recursive=True)
    yield "memory://bucket"
    storage.rm("/bucket", recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def noted(url: str, path: Path) -> None:
        names.append(url.rpartition("/")[2])
        download(url, path)

    monkeypatch.setattr("vmamba.data.sources.remote.download", noted)
    monkeypatch.setattr("vmamba.data.storage._RETRY_WAITS", ())
    return names


def remote(root: str, folder: Path, pattern: str = "train-*.tar", **kwargs: Any) -> RemoteShards:
    return RemoteShards(find_shards(root, [pattern]), NAMES, cache_dir=folder / "cache", **kwargs)


def samples(source: Any) -> list[tuple[bytes, int]]:
    return [(image.tobytes(), label) for image, label in map(source.load, range(len(source)))]


def test_patterns() -> None:
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("a-{8..10}.tar") == ["a-8.tar", "a-9.tar", "a-10.tar"]
    assert expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert expand_braces("plain.tar") == ["plain.tar"]
    for wrong in ("a-{3}.tar", "a-{1..", "{b..c}", "{5..2}"):
        with pytest.raises(DataError, match=r"expected \{first\.\.last\}"):
            expand_braces(wrong)


def test_finding_shards(packed: Path) -> None:
    names = [str(packed / f"train-{n:06}.tar") for n in range(5)]
    assert find_shards(str(packed), ["train-{000000..000004}.tar"]) == names
    assert find_shards(f"{packed}/", ["train-000004.tar", "train-*.tar"]) == [names[4], *names[:4]]
    with pytest.raises(DataError, match=r"test-\*\.tar: no shard matches"):
        find_shards(str(packed), ["test-*.tar"])
    with pytest.raises(DataError, match=r"train-000005\.tar: cannot read the tar"):
        Shards(find_shards(str(packed), ["train-{000000..000005}.tar"]), NAMES)


def test_shards_hold_the_folders_samples_in_another_order(packed: Path) -> None:
    folder = samples(ImageFolder(packed.parent / "images" / "train"))
    source = Shards(find_shards(str(packed), ["train-*.tar"]), read_classes(packed / "classes.txt"))
    assert source.classes == NAMES
    assert sorted(samples(source)) == sorted(folder)
    assert samples(source) != folder
    assert str(source) == f"{packed / 'train-000000.tar'} … {packed / 'train-000004.tar'}"
    assert source.name(17).startswith(f"{packed / 'train-000004.tar'}/000000")
    assert json.loads((packed / "sizes.json").read_text())["val-000004.tar"] == 2


def test_writing_again_gives_the_same_bytes(packed: Path) -> None:
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    write_shards(packed.parent / "images" / "train", packed, "train", samples=4)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
    (packed.parent / "images" / "val" / "red").rename(packed.parent / "images" / "val" / "rot")
    with pytest.raises(DataError, match=r"classes\.txt: holds other classes"):
        write_shards(packed.parent / "images" / "val", packed, "val")


def shard(path: Path, files: dict[str, bytes]) -> list[Path]:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return [path]


def test_labels(tmp_path: Path) -> None:
    image = (make_folder(tmp_path) / "train/red/0.png").read_bytes()
    path = tmp_path / "a.tar"
    source = Shards(
        shard(
            path,
            {
                "1.PNG": image,
                "1.cls": b"02\n",
                "1.txt": b"a caption",
                ".1.png": b"hidden",
                "a.b/2.png": image,
                "a.b/2.json": b'{"label": 1, "size": [20, 16]}',
                "3.png": image,
                "3.cls": b"3",
                "4.png": image,
                "4.cls": b"two",
                "5.png": image,
                "5.json": b'{"class": 1}',
                "6.png": image,
                "6.json": b"[1",
                "7.png": image[:99],
                "7.cls": b"0",
            },
        ),
        NAMES,
    )
    assert [source.load(n)[1] for n in (0, 1)] == [2, 1]
    for number, message in ((2, "got 3"), (3, "got 'two'"), (4, "got '{\"class\": 1}'"), (5, r"got '\[1'")):
        with pytest.raises(
            DataError, match=rf"a\.tar/{number + 1}\.png: expected a label from 0 to 2, {message}"
        ):
            source.load(number)
    with pytest.raises(DataError, match=r"a\.tar/7\.png: not an image"):
        source.load(6)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["1.png"], "sample 1 has no label"),
        (["x/1.cls"], "sample x/1 has no image"),
        (["1.png", "1.cls", "1.jpg"], r"1\.jpg: a second image or label"),
        (["1.txt"], "no samples"),
    ],
)
def test_incomplete_samples_are_reported(files: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"a\.tar.*{message}"):
        Shards(shard(tmp_path / "a.tar", dict.fromkeys(files, b"0")), NAMES)


def test_names_of_classes(tmp_path: Path) -> None:
    assert read_classes(3) == ["0", "1", "2"]
    path = tmp_path / "classes.txt"
    for wrong in ("", "a\n\nb\n", "a\na\n"):
        path.write_text(wrong)
        with pytest.raises(DataError, match=r"classes\.txt: expected a name a line"):
            read_classes(path)
    with pytest.raises(DataError, match=r"none\.txt: cannot read the names"):
        read_classes(tmp_path / "none.txt")


def test_a_storage_gives_the_same_and_each_shard_once(
    packed: Path, bucket: str, fetched: list[str], tmp_path: Path
) -> None:
    local = Shards(find_shards(str(packed), ["train-*.tar"]), NAMES)
    source = remote(bucket, tmp_path)
    assert source.urls == find_shards(bucket, ["train-{000000..000004}.tar"])
    assert source.groups == SampleGroups([4, 4, 4, 4, 2], 16)
    assert fetched == []
    assert samples(source) == samples(local)
    assert sorted(fetched) == [f"train-{n:06}.tar" for n in range(5)]
    assert samples(remote(bucket, tmp_path)) == samples(local)  # a run that follows
    assert len(fetched) == 5
    assert source.name(17) == f"{source.urls[4]}: sample 1"
    assert source.urls[4].endswith("/bucket/train-000004.tar")


def test_without_a_list_of_sizes_shards_are_counted_once(
    bucket: str, fetched: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fsspec.filesystem("memory").rm("/bucket/sizes.json")
    assert len(remote(bucket, tmp_path)) == 18
    assert "fetching 5 shards to count the samples" in caplog.text
    caplog.clear()
    assert remote(bucket, tmp_path).groups.sizes == [4, 4, 4, 4, 2]
    assert not caplog.text
    assert len(fetched) == 5


def test_the_folder_stays_below_its_size(bucket: str, fetched: list[str], tmp_path: Path) -> None:
    size = fsspec.filesystem("memory").info("/bucket/train-000000.tar")["size"]
    source = remote(bucket, tmp_path, window=2, cache_gb=2.5 * size / 1e9)
    for index in (0, 4, 0, 8):  # shards 0, 1, 0, 2
        source.load(index)
    assert len(fetched) == 3
    kept = {path.name.partition("-")[2] for path in (tmp_path / "cache").glob("*.tar")}
    assert len(kept) == 2
    assert "train-000002.tar" in kept
    assert samples(source) == samples(remote(bucket, tmp_path / "other"))
    assert len(source._open) == 3
    with pytest.raises(DataError, match=r"16 shards|5 shards of .* raise data\.cache_gb"):
        remote(bucket, tmp_path, cache_gb=2.5 * size / 1e9)


def test_processes_share_the_folder(bucket: str, fetched: list[str], tmp_path: Path) -> None:
    """Many readers at once, more than the folder holds: each sample is right, none is half of a file."""
    size = fsspec.filesystem("memory").info("/bucket/train-000000.tar")["size"]
    expected = samples(remote(bucket, tmp_path / "other"))
    actual: list[Any] = []

    def read(first: int) -> None:
        source = remote(bucket, tmp_path, window=1, cache_gb=1.5 * size / 1e9)
        order = [(first + 5 * n) % 18 for n in range(18)]
        actual.append([source.load(index)[0].tobytes() == expected[index][0] for index in order])

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert actual == [[True] * 18] * 4
    assert not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_is_told_or_replaced(
    workers: int, bucket: str, fetched: list[str], tmp_path: Path
) -> None:
    storage = fsspec.filesystem("memory")
    storage.pipe("/bucket/train-000001.tar", storage.cat("/bucket/train-000001.tar")[:3000])
    storage.rm("/bucket/train-000003.tar")
    urls = [f"{bucket}/train-{n:06}.tar" for n in range(5)]
    source = RemoteShards(urls, NAMES, cache_dir=tmp_path / "cache")
    data = ClassificationDataset(source, lambda image: image.height)

    def loader(**kwargs: Any) -> ResumableLoader:
        sampler = EpochSampler(18, groups=source.groups)
        return ResumableLoader(data, sampler, batch_size=6, num_workers=workers, **kwargs)

    with pytest.raises(DataError, match=r"train-00000\d\.tar: sample \d: .*train-00000[13]\.tar"):
        list(loader())
    replacing = loader(on_error="replace")
    indices = [index for loaded in replacing for index in loaded.indices]
    assert len(indices) == 18
    assert set(indices) == {0, 1, 2, 3, 8, 9, 10, 11, 16, 17}
    assert len(replacing.skipped) == 8  # samples, of two shards
    message = "\n".join(replacing.skipped)
    assert "train-000001.tar: sample 3: " in message
    assert "unexpected end of data" in message
    assert "train-000003.tar: sample 0: memory://bucket/train-000003.tar: cannot fetch the shard" in message


def test_a_shard_of_another_size_is_told(bucket: str, fetched: list[str], tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/sizes.json", b'{"train-000000.tar": 5}')
    source = remote(bucket, tmp_path, "train-000000.tar")
    for _ in range(2):  # it is not fetched again and again
        with pytest.raises(DataError, match=r"holds 4 samples, and 5 by the list of sizes"):
            source.load(0)
    assert len(fetched) == 1
    fsspec.filesystem("memory").pipe("/bucket/sizes.json", b'{"train-000000.tar": "5"}')
    with pytest.raises(DataError, match=r"sizes\.json: expected"):
        remote(bucket, tmp_path, "train-000000.tar")


def test_a_short_download_is_tried_again(
    bucket: str, fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage: Any = type(fsspec.filesystem("memory"))
    real, tries = storage.get_file, []

    def get_file(self: Any, source: str, target: str, **kwargs: Any) -> None:
        real(self, source, target, **kwargs)
        tries.append(source)
        if len(tries) < 3:
            os.truncate(target, 1000)

    monkeypatch.setattr(storage, "get_file", get_file)
    with pytest.raises(DataError, match=r"cannot fetch the shard .*1000 of \d+ bytes came"):
        remote(bucket, tmp_path).load(0)
    assert not list((tmp_path / "cache").glob("*.tar*[!k]"))
    monkeypatch.setattr("vmamba.data.storage._RETRY_WAITS", (0.0, 0.0))
    assert remote(bucket, tmp_path).load(0)[0].size == (20, 16)
    assert len(tries) == 3


def test_storages_that_do_not_exist(tmp_path: Path) -> None:
    for url, message in (
        ("nowhere://a/b.tar", "no address that fsspec knows"),
        ("memory://a/b.tar", "cannot read"),
    ):
        with pytest.raises(DataError, match=rf"b\.tar: {message}"):
            RemoteShards([url], NAMES, cache_dir=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: cannot make the folder"):
        RemoteShards(["memory://a/b.tar"], NAMES, cache_dir=tmp_path / "file")


def recipe(packed: Path, *overrides: str) -> ClassificationRecipe:
    values = tiny_values(packed)
    values["data"] |= {
        "source": "webdataset",
        "train_split": "train-{000000..000004}.tar",
        "val_split": ["val-*.tar"],
        "classes": str(packed / "classes.txt"),
    }
    return check(ClassificationRecipe, override_values(values, overrides), "test")


def test_a_recipe_trains_on_shards(packed: Path, bucket: str, tmp_path: Path) -> None:
    short = ("schedule.epochs=1", "schedule.warmup_epochs=0")
    scores = train(recipe(packed, *short), tmp_path / "run").scores
    assert scores.keys() == {"val/loss", "val/top1", "val/top5"}
    remote = (f"data.root={bucket}", f"data.cache_dir={tmp_path / 'cache'}", "data.shuffle_shards=2")
    scores = train(recipe(packed, *short, *remote), tmp_path / "remote").scores
    assert scores.keys() == {"val/loss", "val/top1", "val/top5"}


def test_the_recipe_says_what_a_source_needs(packed: Path) -> None:
    for override, message in (
        ("data.classes=null", "data: classes: missing"),
        ("data.classes=0", "data: classes: expected at least 1, got 0"),
        ("data.root=s3://bucket/folder", "data: cache_dir: missing; shards from s3://bucket/folder"),
        ("data.source=tar", r"data\.val_split: Input should be a valid string, got \['val-\*\.tar'\]"),
        ("data.cache_gb=0", "data.cache_gb: "),
        ("data.shuffle_shards=0", "data.shuffle_shards: "),
    ):
        with pytest.raises(RecipeError, match=message):
            recipe(packed, override)
    with pytest.raises(RecipeError, match=r"data\.classes: no such key"):
        recipe(packed, "data.source=folder", "data.val_split=val")
    task = ClassificationTask(recipe(packed, "data.classes=2"))
    with pytest.raises(DataError, match="expected a label from 0 to 1, got 2"):
        samples(task.dataset("train").source)
