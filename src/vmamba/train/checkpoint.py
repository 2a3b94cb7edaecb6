"""Checkpoints: written whole or not at all, and read without running code."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import nn

from vmamba.errors import CheckpointError
from vmamba.models.official import load_official, read_checkpoint

CONTENTS = "vmamba"
"""Where a checkpoint keeps what makes it self-sufficient: recipe, classes, version."""


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Have a block write a file that takes the place of `path` only when it is whole and on disk.

    Yields:
        The temporary path to write to, in the same folder; whatever happens, it is gone afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that appears under `path` only when it is whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def checksum_path(path: str | os.PathLike[str]) -> Path:
    """The file beside a checkpoint that holds its SHA-256."""
    return Path(f"{os.fspath(path)}.sha256")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints through `replacing`, with a checksum beside, read with weights_only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        sums = checksum_path(path)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)
            line = f"{_digest(temporary)}  {path.name}\n"
            # Until the rename the old checkpoint stands, after it the new: a crash leaves a line for either.
            write_atomically(sums, (sums.read_text() if path.exists() and sums.exists() else "") + line)
        write_atomically(sums, line)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        checksum_path(path).unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after checking it against the checksum beside it, if there is one.

    Raises:
        CheckpointError: It is missing, damaged, or holds more than weights and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    sums = checksum_path(path)
    if sums.is_file() and _digest(path) not in sums.read_text().split():
        raise CheckpointError(f"{path}: damaged, its content does not match {sums.name}; use another")
    return read_checkpoint(path)


def contents(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[str]]:
    """The recipe, as plain values, and the classes that a checkpoint holds.

    Raises:
        CheckpointError: It is not one of a run.
    """
    match checkpoint.get("state_dict"), checkpoint.get(CONTENTS):
        case dict(), {"recipe": dict(recipe), "classes": list(classes)}:
            return recipe, classes
    raise CheckpointError(f"{path}: not the checkpoint of a run, it has no recipe in it")


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own weights in a run's checkpoint."""
    prefix = "model."
    return {
        name.removeprefix(prefix): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }


def load_weights(model: nn.Module, path: str) -> None:
    """Load a run's checkpoint, the authors' `.pth` file, or a safetensors file into a model.

    Raises:
        CheckpointError: It cannot be read safely, or does not fit in every name and shape.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            load_official(model, load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: no safetensors file, or a damaged one ({error})") from error
        return
    checkpoint = load_checkpoint(path)
    load_official(model, model_weights(checkpoint) if CONTENTS in checkpoint else checkpoint)
