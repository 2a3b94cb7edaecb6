"""Validation samples held back from data without a validation split."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from images import make_folder
from vmamba.data import ImageFolder, SampleGroups, SplitImages, TarImages, write_tar
from vmamba.data.splitting import choose_held_back
from vmamba.errors import DataError

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=5)
FRACTIONS = st.floats(0.01, 0.99)


def samples(sizes: list[int]) -> tuple[list[str], np.ndarray]:
    keys = [f"{label}/{number}.png" for label, size in enumerate(sizes) for number in range(size)]
    return keys, np.repeat(np.arange(len(sizes)), sizes)


def chosen(keys: list[str], labels: np.ndarray, fraction: float, seed: int = 0) -> set[str]:
    held = choose_held_back(keys, labels, fraction, seed)
    return {key for key, out in zip(keys, held, strict=True) if out}


@given(SIZES, FRACTIONS, st.integers(0, 9))
def test_each_class_gives_its_share(sizes: list[int], fraction: float, seed: int) -> None:
    keys, labels = samples(sizes)
    counts = Counter(key.partition("/")[0] for key in chosen(keys, labels, fraction, seed))
    for label, size in enumerate(sizes):
        expected = min(max(round(fraction * size), 1), size - 1) if size > 1 else 0
        assert counts[str(label)] == expected


@given(SIZES, FRACTIONS, st.data())
def test_the_order_changes_nothing_and_an_added_file_moves_one_other(
    sizes: list[int], fraction: float, data: st.DataObject
) -> None:
    keys, labels = samples(sizes)
    before = chosen(keys, labels, fraction)
    order = data.draw(st.permutations(range(len(keys))))
    assert chosen([keys[i] for i in order], labels[list(order)], fraction) == before
    after = chosen([*keys, "0/new.png"], np.append(labels, 0), fraction)
    moved = (before ^ after) - {"0/new.png"}
    assert len(moved) <= 1
    assert all(key.startswith("0/") for key in moved)


def test_the_seed_chooses_others() -> None:
    keys, labels = samples([50, 50])
    assert chosen(keys, labels, 0.2, seed=0) != chosen(keys, labels, 0.2, seed=1)
    # Runs are resumed with the split they began with.
    assert sorted(chosen(*samples([6]), 0.4)) == ["0/0.png", "0/3.png"]


def test_both_sides_of_a_folder_and_of_its_tar(tmp_path: Path) -> None:
    root = make_folder(tmp_path) / "train"
    write_tar(root, tmp_path / "train.tar")
    sides: dict[str, list[set[str]]] = {"train": [], "val": []}
    for source in (ImageFolder(root), TarImages(tmp_path / "train.tar")):
        for split, seen in sides.items():
            side = SplitImages(source, split, 0.3)  # type: ignore[arg-type]
            seen.append({side.key(i) for i in range(len(side))})
            assert side.classes == source.classes
            assert Counter(side.labels().tolist()) == dict.fromkeys(range(3), 2 if split == "val" else 4)
            original = [source.key(i) for i in range(len(source))].index(side.key(3))
            assert side.load(3)[0].tobytes() == source.load(original)[0].tobytes()
            assert side.name(3) == source.name(original)
    assert sides["train"][0] == sides["train"][1]
    assert sides["val"][0] == sides["val"][1]
    assert not sides["train"][0] & sides["val"][0]
    assert len(sides["train"][0] | sides["val"][0]) == 18


def test_groups_shrink(tmp_path: Path) -> None:
    source = ImageFolder(make_folder(tmp_path) / "train")
    source.groups = SampleGroups([10, 8], 2)
    side = SplitImages(source, "val", 0.3)
    assert side.groups is not None
    assert sum(side.groups.sizes) == 6
    assert side.groups.sizes[0] == sum(side.indices < 10)


def test_single_samples_cannot_be_split(tmp_path: Path) -> None:
    source = ImageFolder(make_folder(tmp_path, each=1) / "train")
    with pytest.raises(DataError, match="no class has two samples"):
        SplitImages(source, "val", 0.5)
