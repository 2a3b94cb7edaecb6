import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vmamba.errors import CheckpointError
from vmamba.files import replacing
from vmamba.models import load_weights
from vmamba.models.checkpoints import checksum_path, read_checkpoint
from vmamba.train.checkpoint import AtomicCheckpointIO
from vmamba.train.session import open_session


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(1000.0)}, path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_round_trip(path: Path) -> None:
    assert torch.equal(read_checkpoint(path)["weights"], torch.arange(1000.0))
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["weights"], torch.arange(1000.0))
    assert names(path.parent) == ["last.ckpt", "last.ckpt.sha256"]
    AtomicCheckpointIO().remove_checkpoint(path)
    assert names(path.parent) == []


class FullDiskError(OSError):
    pass


@pytest.mark.parametrize("where", ["write", "fsync", "replace", "second replace", "third replace"])
def test_a_failure_in_the_middle_leaves_one_whole_checkpoint(
    where: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_save, real_replace, replaced = torch.save, os.replace, [0]

    def save(content: Any, file: Any) -> None:
        real_save(content, file)
        if where == "write":
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise FullDiskError

    def fsync(descriptor: int) -> None:
        if where == "fsync":
            raise FullDiskError

    def replace(source: Any, target: Any) -> None:
        replaced[0] += 1
        if where == {1: "replace", 2: "second replace", 3: "third replace"}[replaced[0]]:
            raise FullDiskError
        real_replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)
        with pytest.raises(CheckpointError, match=r"could not be written .* Make room on the disk"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(7)}, path)
    expected = torch.ones(7) if where == "third replace" else torch.arange(1000.0)
    assert torch.equal(read_checkpoint(path)["weights"], expected)
    assert names(path.parent) == ["last.ckpt", "last.ckpt.sha256"]


def test_replacing_keeps_the_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("length", [0, 10, 1000, -1])
def test_a_truncated_checkpoint_is_told_by_its_checksum(length: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: damaged, its content does not match"):
        read_checkpoint(path)


def test_one_flipped_bit_is_told(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("length", [0, 10, 1000])
def test_a_truncated_checkpoint_without_checksum(length: int, path: Path) -> None:
    checksum_path(path).unlink()
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"last\.ckpt: (damaged|refused)"):
        read_checkpoint(path)


def test_a_folder_or_nothing_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.ckpt"):
        with pytest.raises(CheckpointError, match=r"no such checkpoint|no checkpoint in this folder"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged, the file is empty; get it again"),
        (b"hello there", "no checkpoint, by its first bytes; expected a file that torch.save wrote"),
        (b"e\n", "no checkpoint, by its first bytes"),
        (b"\x89PNG\r\n\x1a\n", "no checkpoint, by its first bytes"),
        (b"<!DOCTYPE html>", "no checkpoint, by its first bytes"),
        (b"PK\x03\x04" + 100 * b"0", "damaged, or no PyTorch checkpoint; get it again"),
        (b"\x80\x02e", "damaged, or no PyTorch checkpoint; get it again"),
    ],
    ids=["empty", "text", "two bytes", "an image", "a web page", "a zip", "a pickle"],
)
def test_what_is_no_checkpoint_says_so_in_words(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path)
    assert str(raised.value).startswith(f"{path}: {message}")
    assert "(" not in str(raised.value)


class Code:
    """Pickled, it makes a folder when it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_code_in_a_checkpoint_does_not_run(form: str, tmp_path: Path) -> None:
    path, proof = tmp_path / "bad.ckpt", tmp_path / "proof"
    content = {"state_dict": {}, "vmamba": Code(proof)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "torch")
    for load in (read_checkpoint, open_session, lambda path: load_weights(nn.Linear(2, 2), str(path))):
        with pytest.raises(CheckpointError, match=r"bad\.ckpt: refused"):
            load(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "content",
    [{}, {"state_dict": {}}, {"state_dict": {}, "vmamba": {"recipe": 3}}, {"state_dict": 3, "vmamba": {}}],
    ids=["empty", "no recipe", "recipe of another type", "weights of another type"],
)
def test_not_the_checkpoint_of_a_run(content: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other\.ckpt: not the checkpoint of a run"):
        open_session(path)


def test_load_weights_from_safetensors(tmp_path: Path) -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    load_weights(target, str(path))
    assert torch.equal(source.weight, target.weight)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: no safetensors file"):
        load_weights(target, str(path))
    with pytest.raises(CheckpointError, match="none"):
        load_weights(target, str(tmp_path / "none.safetensors"))


def test_load_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(nn.Linear(2, 4).state_dict(), path)
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match=r"weight expected \(3, 2\), got \(4, 2\)"):
        load_weights(model, str(path))
    assert torch.equal(model.weight, before)
