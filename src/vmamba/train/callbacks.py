"""What a run writes and shows beside its checkpoints."""

import csv
import io
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from vmamba.errors import UserError
from vmamba.files import replacing, write_atomically
from vmamba.train.checkpoint import (
    earlier_checkpoints,
    keep_as,
    remove_checkpoint,
    step_path,
)

log = logging.getLogger(__name__)


class Interrupted(UserError):  # noqa: N818  (named as KeyboardInterrupt is)
    """The run was stopped by a signal, behind a whole step and with a checkpoint."""


class StopOnSignal(Callback):
    """At Ctrl-C, SIGTERM or SIGUSR1 finish the step, write last.ckpt, raise `Interrupted`.

    At a second Ctrl-C stop at once. Any process of the run may get the signal. To an epoch's last step
    belongs its evaluation. A job of SLURM that is told to go (SIGTERM, or SIGUSR1 by `--signal`) is put into
    the queue again. Outside the main thread signals are left alone.

    Args:
        folder: Of the run.
        save: Writes last.ckpt.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
    )

    def __init__(self, folder: Path, save: Callable[[lightning.Trainer], None]) -> None:
        self.folder, self.save = folder, save
        self.asked: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals within a block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in self.SIGNALS}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number in self.SIGNALS:
            signal.signal(number, self._ask)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        # Lightning's handlers, set since, talk to other processes in the middle of a step.
        if signal.getsignal(signal.SIGINT) == self._ask:
            self._listen()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print(
                "\nfinishing the step, then writing a checkpoint; Ctrl-C again stops at once", file=sys.stderr
            )

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if at_step(trainer) and not trainer.is_last_batch and self._any_asked(trainer):
            self.save(trainer)
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch + 1 < pl_module.recipe.schedule.epochs and self._any_asked(trainer):
            self._stop(trainer)  # `Checkpoints` has written one

    def _any_asked(self, trainer: lightning.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.asked is not None, all=False)

    def _stop(self, trainer: lightning.Trainer) -> None:
        job = os.environ.get("SLURM_JOB_ID")
        again = f"to go on: vmamba train --resume {self.folder}"
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


class Checkpoints(Callback):
    """`last.ckpt` behind every epoch and every so many steps, `best.ckpt` where the score is the best so far.

    Those that were the last before are kept under their step's number: one may be damaged. Lightning's own
    callback writes the last one only together with the best.

    Args:
        folder: Of the run.
        every: Steps between checkpoints within an epoch.
        keep: Newest to keep.
        resumed_from: The checkpoint of the folder that the run goes on from.

    Attributes:
        scores: Of the last evaluation, be it before the run was resumed.
    """

    def __init__(self, folder: Path, every: int | None, keep: int, resumed_from: Path | None = None) -> None:
        self.folder, self.every, self.keep = folder / "checkpoints", every, keep
        self.resumed_from = resumed_from
        self.best = -math.inf
        self.scores: dict[str, float] = {}
        self._at: int | None = None  # the step of last.ckpt, if it is whole

    def save(self, trainer: lightning.Trainer) -> None:
        """Write last.ckpt."""
        last = self.folder / "last.ckpt"
        if trainer.is_global_zero and self._at is not None and self._at != trainer.global_step:
            keep_as(last, step_path(last, self._at))
            for path in earlier_checkpoints(self.folder)[self.keep - 1 :]:
                remove_checkpoint(path)
        trainer.save_checkpoint(last)
        self._at = trainer.global_step

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self.resumed_from == self.folder / "last.ckpt":
            self._at = trainer.global_step

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        due = self.every is not None and trainer.global_step % self.every == 0
        if due and at_step(trainer) and not trainer.is_last_batch:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        found = trainer.callback_metrics.items()
        self.scores = {name: value.item() for name, value in found if name.startswith("val/")}
        score = self.scores[f"val/{pl_module.monitor}"]
        if not score <= self.best:
            self.best = score
            trainer.save_checkpoint(self.folder / "best.ckpt")
        self.save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "scores": self.scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.scores = state_dict["best"], state_dict["scores"]


class Throughput(Callback):
    """Training images a second, of the epoch so far, on the progress bar and in the metrics."""

    def __init__(self) -> None:
        self._start, self._seen = 0.0, 0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._start, self._seen = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._seen += len(batch.indices) * trainer.world_size
        pl_module.log(
            "images/s",
            self._seen / (time.perf_counter() - self._start),
            prog_bar=True,
            on_step=True,
            on_epoch=False,
            batch_size=1,
        )


class Blemishes(Callback):
    """Tells of every sample that was left out once, and of steps left out, and counts both in the metrics."""

    def __init__(self) -> None:
        self._told: dict[str, None] = {}

    def _tell(self, loader: Any) -> None:
        for message in loader.skipped:
            if message not in self._told:
                self._told[message] = None
                log.warning("left out: %s", message)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._tell(trainer.train_dataloader)

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._tell(trainer.val_dataloaders)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        train = pl_module.recipe.train
        if train.on_error == "skip":
            pl_module.log("skipped/samples", float(len(self._told)), reduce_fx="sum", sync_dist=True)
        if train.on_nonfinite == "skip":
            pl_module.log("skipped/steps", float(pl_module.skipped_steps))


class MetricsFile(Callback):
    """`metrics.csv`, a row an epoch, and `curves.png` from it.

    Args:
        folder: Of the run. Rows that it holds already stay, but those of epochs that are run again.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.picture = folder / "metrics.csv", folder / "curves.png"

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        rows = [row for row in read_metrics(self.path) if int(row["epoch"]) < trainer.current_epoch]
        found = {
            name.removesuffix("_epoch"): f"{value.item():.6g}"
            for name, value in sorted(trainer.callback_metrics.items())
            if not name.endswith("_step")
        }
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "lr": f"{rate:.6g}", **found}
        rows.append({name: str(value) for name, value in row.items()})
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, table.getvalue())

    def on_exception(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.on_fit_end(trainer)

    def on_fit_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.is_global_zero and self.path.exists():
            draw_curves(read_metrics(self.path), self.picture)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a `metrics.csv`; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def draw_curves(rows: list[dict[str, str]], path: Path) -> None:
    """Losses above, scores below, over the epochs, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    for name in dict.fromkeys(name for row in rows for name in row):
        if name.startswith(("train/", "val/")):
            points = [(int(row["epoch"]) + 1, float(row[name])) for row in rows if row.get(name)]
            axes = upper if "loss" in name else lower
            axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3)
    upper.set_ylabel("loss")
    lower.set(xlabel="epoch", ylabel="score")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


class ProgressLine(Callback):
    """One line on stderr for the run: epoch, time left, losses, scores, images/s."""

    def __init__(self) -> None:
        self._line: Progress | None = None
        self._drawn = 0.0

    def _start(self, trainer: lightning.Trainer, what: str, total: int, done: int) -> None:
        if trainer.is_global_zero:
            columns = (
                TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=11)),
                BarColumn(bar_width=8),
                TimeRemainingColumn(compact=True),
                TextColumn("left {task.fields[shown]}", table_column=Column(no_wrap=True)),
            )
            self._line = Progress(*columns, console=Console(stderr=True))
            self._line.add_task(what, total=total, completed=done, shown="")
            self._line.start()

    def _stop(self) -> None:
        if self._line is not None:
            self._line.stop()
            self._line = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._start(trainer, "training", pl_module.steps, trainer.global_step)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        now = time.perf_counter()
        last = trainer.global_step == pl_module.steps
        if self._line is None or (now - self._drawn < 0.2 and not last):  # a look at a metric waits for a GPU
            return
        self._drawn = now
        self._line.update(
            self._line.task_ids[0],
            completed=trainer.global_step,
            description=f"epoch {trainer.current_epoch + 1}/{pl_module.recipe.schedule.epochs}",
            shown=" ".join(
                f"{name.removeprefix('train/').removesuffix('_step')} {value:.{0 if value >= 10 else 3}f}"
                for name, value in trainer.progress_bar_metrics.items()
                if not name.endswith("_epoch")
            ),
        )

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._start(trainer, "evaluating", int(sum(trainer.num_val_batches)), 0)

    def on_validation_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self._line is not None and trainer.state.fn == TrainerFn.VALIDATING:
            self._line.advance(self._line.task_ids[0])

    def teardown(self, *_: Any, **__: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()
