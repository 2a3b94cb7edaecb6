"""Stop a run at a signal, after a complete step and with a checkpoint."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from vmamba.errors import UserError

log = logging.getLogger(__name__)


class Interrupted(UserError):  # noqa: N818  (named as KeyboardInterrupt is)
    """The run was stopped by a signal; the message says how to resume it."""


class StopOnSignal(Callback):
    """At Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP finish the step, write last.ckpt, raise `Interrupted`.

    A second Ctrl-C stops at once. Any process of the run may get the signal. If the step is followed by an
    evaluation, that is finished too. A SLURM job that gets SIGTERM (or SIGUSR1, by `--signal`) is requeued.
    Outside the main thread no handlers are installed, nor for a SIGHUP that nohup makes ignored.

    Args:
        folder: Of the run.
        save: Writes last.ckpt, if there is none of this step.
        steps: Of the whole run: a signal in the last one lets it finish.
    """

    SIGNALS = tuple(
        getattr(signal, name)
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
        if hasattr(signal, name)  # Windows lacks the last two
    )

    def __init__(self, folder: Path, save: Callable[[lightning.Trainer], None], steps: int) -> None:
        self.folder, self.save, self.steps = folder, save, steps
        self.asked: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals within a block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in self.SIGNALS}
        hangup = getattr(signal, "SIGHUP", None)
        if hangup is not None and handlers[hangup] == signal.SIG_IGN:
            del handlers[hangup]
        self._caught = list(handlers)
        self._listen()
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number in self._caught:
            signal.signal(number, self._ask)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        # Replace the handlers that Lightning has set since: they use collectives in the middle of a step.
        if signal.getsignal(signal.SIGINT) == self._ask:
            self._listen()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == signal.SIGINT:
            raise Interrupted(f"stopped at once, in the middle of a step; {how_to_go_on(self.folder)}")
        self.asked = number
        if number == signal.SIGINT:
            print(
                "\nfinishing the step, then writing a checkpoint; Ctrl-C again stops at once", file=sys.stderr
            )

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if at_step(trainer) and not trainer.is_last_batch:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.is_last_batch:
            self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: lightning.Trainer) -> None:
        asked = trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False)
        if not asked or trainer.global_step >= self.steps or trainer.should_stop:
            return
        self.save(trainer)
        job = os.environ.get("SLURM_JOB_ID")
        again = how_to_go_on(self.folder)
        if job is not None and self.asked != signal.SIGINT and trainer.is_global_zero:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                again = f"job {job} is in the queue again"
            else:
                log.warning("SLURM does not queue job %s again: %s", job, done.stderr.strip())
        raise Interrupted(f"interrupted after step {trainer.global_step}; {again}")


def at_step(trainer: lightning.Trainer) -> bool:
    """Whether the batch just read was the last of a step."""
    return (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0


def how_to_go_on(folder: Path) -> str:
    """How to resume a run that has ended early, in one sentence."""
    if holds_run(folder):
        return f"to go on: vmamba resume {folder}"
    return "there is no checkpoint yet: start the run again"


def holds_run(folder: str | Path) -> bool:
    """Whether the folder has a checkpoint, even a damaged one."""
    checkpoints = Path(folder) / "checkpoints"
    return (checkpoints / "last.ckpt").exists() or any(checkpoints.glob("step-*.ckpt"))
