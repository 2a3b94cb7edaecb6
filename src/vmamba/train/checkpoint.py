"""Checkpoints: written whole or not at all, and read without running code."""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import nn

from vmamba.errors import CheckpointError
from vmamba.models.official import checkpoint_filter_fn, load_official, read_checkpoint

log = logging.getLogger(__name__)

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
        """Write a checkpoint.

        Raises:
            CheckpointError: The disk is full or does not take it; the file of that name is as it was.
        """
        path = Path(path)
        sums = checksum_path(path)
        try:
            with replacing(path) as temporary:
                torch.save(checkpoint, temporary)
                line = f"{_digest(temporary)}  {path.name}\n"
                # Until the rename the old one stands, after it the new: a crash leaves a line for either.
                old = sums.read_text() if path.exists() and sums.exists() else ""
                write_atomically(sums, old + line)
            write_atomically(sums, line)
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter
            raise CheckpointError(
                f"{path}: could not be written ({error}); what it held before is intact. Make room on the "
                "disk, then resume the run"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        remove_checkpoint(path)


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint and its checksum."""
    Path(path).unlink(missing_ok=True)
    checksum_path(path).unlink(missing_ok=True)


def step_path(last: Path, step: int) -> Path:
    """Where the checkpoint of a step is kept beside the last one."""
    return last.with_name(f"step-{step:09d}.ckpt")


def keep_as(path: Path, name: Path) -> None:
    """Give a checkpoint a second name, which stays when the first is written anew."""
    for old, new in ((checksum_path(path), checksum_path(name)), (path, name)):
        if old.exists():
            with replacing(new) as temporary:
                try:
                    os.link(old, temporary)
                except OSError:  # not every file system has links
                    shutil.copyfile(old, temporary)


def earlier_checkpoints(folder: Path) -> list[Path]:
    """Those kept under their step's number, the newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint in a run's `checkpoints`, and what it holds.

    Damaged ones are passed over, with a warning.

    Raises:
        CheckpointError: There is none.
    """
    problems: list[str] = []
    for path in (folder / "last.ckpt", *earlier_checkpoints(folder)):
        try:
            found = load_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning("%s", problem)
        if problems:
            log.warning("going on from %s", path)
        return path, found
    raise CheckpointError("\n  ".join(problems))


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


_PREFIXES = {"raw": "model.", "ema": "ema.module."}


def weights_kinds(checkpoint: Mapping[str, Any]) -> list[str]:
    """ "raw", and "ema" where a run's checkpoint has the average of its weights too."""
    return [
        kind
        for kind, prefix in _PREFIXES.items()
        if any(name.startswith(prefix) for name in checkpoint["state_dict"])
    ]


def model_weights(
    checkpoint: Mapping[str, Any], kind: str = "raw", path: str | os.PathLike[str] = "checkpoint"
) -> dict[str, Any]:
    """The model's weights in a run's checkpoint.

    Args:
        checkpoint: Of a run.
        kind: "raw", "ema", or "auto" for the average where there is one.
        path: For messages.

    Raises:
        CheckpointError: It has no such weights.
    """
    kinds = weights_kinds(checkpoint)
    kind = kinds[-1] if kind == "auto" and kinds else kind
    if kind not in kinds:
        has = ", ".join(map(repr, kinds)) or "none"
        raise CheckpointError(f"{path}: has no {kind!r} weights; it has {has}")
    prefix = _PREFIXES[kind]
    return {
        name.removeprefix(prefix): weight
        for name, weight in checkpoint["state_dict"].items()
        if name.startswith(prefix)
    }


def load_weights(model: nn.Module, path: str, kind: str = "auto", new_classifier: bool = True) -> None:
    """Load a run's checkpoint, the authors' `.pth` file, or a safetensors file into a model.

    Args:
        model: Of timm's registry.
        path: Of the file.
        kind: "raw", "ema", or "auto": the average of a run's checkpoint where it has one, what was trained
            of the authors'.
        new_classifier: Where the file's classifier has another number of classes leave the model's as it
            is, which a warning says.

    Raises:
        CheckpointError: It cannot be read safely, has no such weights, or all else does not fit in every
            name and shape.
    """
    weights = checkpoint_filter_fn(_read_weights(path, kind), model)
    if new_classifier:
        weights |= _other_classifier(model, weights, path)
    try:
        load_official(model, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix('state dict: ')}") from error


def _read_weights(path: str, kind: str) -> Mapping[str, Any]:
    if Path(path).suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights: Mapping[str, Any] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: no safetensors file, or a damaged one ({error})") from error
    else:
        weights = load_checkpoint(path)
        if CONTENTS in weights:
            contents(weights, path)
            return model_weights(weights, kind, path)
    if kind != "ema":
        return weights
    if not isinstance(weights.get("model_ema"), dict):
        raise CheckpointError(f"{path}: has no average of the weights; take model.weights_kind=auto")
    return weights["model_ema"]


def _other_classifier(model: nn.Module, weights: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The model's own classifier, if that in `weights` has another number of classes."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    own = model.state_dict()
    other: dict[str, Any] = {}
    for name in (names,) if isinstance(names, str) else names:
        mine, theirs = own.get(f"{name}.weight"), weights.get(f"{name}.weight")
        if mine is None or not isinstance(theirs, torch.Tensor) or mine.shape[1:] != theirs.shape[1:]:
            continue
        if len(mine) != len(theirs):
            log.warning(
                "%s: its classifier is for %d classes, the model's for %d: it starts anew",
                *(path, len(theirs), len(mine)),
            )
            other |= {key: own[key] for key in (f"{name}.weight", f"{name}.bias") if key in own}
    return other
