"""Checkpoints of a run, written completely or not at all."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from vmamba.errors import CheckpointError
from vmamba.files import replacing, sha256, write_atomically
from vmamba.models.checkpoints import checksum_path, read_checkpoint, seal

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints through `replacing`, with a digest inside and a checksum beside."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: The disk is full or does not take it; the file of that name is as it was.
        """
        path = Path(path)
        sums = checksum_path(path)
        existed = path.exists()
        try:
            with replacing(path) as temporary:
                torch.save(seal(checkpoint), temporary)
                line = f"{sha256(temporary)}  {path.name}\n"
                # A crash leaves the old checkpoint or the new one, so the checksum file lists both.
                old = sums.read_text() if path.exists() and sums.exists() else ""
                write_atomically(sums, old + line)
            write_atomically(sums, line)
        except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter
            if existed:
                advice = "what it held before is intact. Make room on the disk, then resume the run"
            else:
                advice = "there is no checkpoint yet. Make room on the disk, then start the run again"
            raise CheckpointError(f"{path}: could not be written ({error}); {advice}") from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)

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
    """Give a checkpoint a second name, which keeps its content when the first is overwritten."""
    for old, new in ((checksum_path(path), checksum_path(name)), (path, name)):
        if old.exists():
            with replacing(new) as temporary:
                try:
                    os.link(old, temporary)
                except OSError:  # not every file system has links
                    shutil.copyfile(old, temporary)


def earlier_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints kept under their step's number, the newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest undamaged checkpoint in a run's `checkpoints`, and its content.

    Damaged ones are passed over, with a warning.

    Raises:
        CheckpointError: There is none.
    """
    problems: list[str] = []
    for path in (folder / "last.ckpt", *earlier_checkpoints(folder)):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            log.warning("%s", problem)
        if problems:
            log.warning("going on from %s", path)
        return path, checkpoint
    raise CheckpointError("\n  ".join(problems))
