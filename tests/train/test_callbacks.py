"""What `Milestones` measures, with a clock that the test sets."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmamba.train import callbacks
from vmamba.train.callbacks import Milestones
from vmamba.train.progress import ProgressLine


class Clock:
    """Batches of an epoch that take as long as the test says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(callbacks.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(callbacks, "at_step", lambda trainer: False)
        self.progress = ProgressLine()
        self.milestones = Milestones(folder, None, None, self.progress)  # type: ignore[arg-type]
        self.trainer: Any = SimpleNamespace(world_size=2, train_dataloader=SimpleNamespace(skipped=[]))

    def epoch(self, *seconds: float) -> float:
        """The images/s shown after an epoch whose batches of 3 images a process end after so many seconds."""
        self.milestones.on_train_epoch_start(self.trainer, None)
        for each in seconds:
            self.now += each
            batch = SimpleNamespace(indices=[0, 1, 2])
            self.milestones.on_train_batch_end(self.trainer, None, None, batch, 0)
        return self.progress.scores["images/s"]


def test_the_start_of_an_epoch_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers start, and PyTorch sets up what the first step needs: that is not the speed of training."""
    clock = Clock(tmp_path, monkeypatch)
    assert clock.epoch(90, 2, 1) == pytest.approx(12 / 3)
    assert clock.epoch(10, 1, 2) == pytest.approx(24 / 6)


def test_an_epoch_of_one_batch_has_a_speed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(tmp_path, monkeypatch)
    assert clock.epoch(2) == pytest.approx(3)
    assert clock.epoch(1) == pytest.approx(6)
