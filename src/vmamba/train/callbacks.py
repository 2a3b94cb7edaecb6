"""What a run writes and shows beside its checkpoints."""

import csv
import io
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
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
from vmamba.train.checkpoint import replacing, write_atomically


class Interrupted(UserError):  # noqa: N818  (named as KeyboardInterrupt is)
    """The run was stopped by a signal, behind a whole step and with a checkpoint."""


class StopOnInterrupt(Callback):
    """At the first Ctrl-C finish the step, write last.ckpt, raise `Interrupted`; at the second, stop at once.

    To an epoch's last step belongs its evaluation. Outside the main thread Ctrl-C is left alone.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch Ctrl-C within a block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nfinishing the step, then writing a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self.asked and not trainer.is_last_batch:
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
            self._stop(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self.asked and trainer.current_epoch + 1 < pl_module.recipe.schedule.epochs:
            self._stop(trainer)  # `Checkpoints` has written one

    def _stop(self, trainer: lightning.Trainer) -> None:
        raise Interrupted(
            f"interrupted after step {trainer.global_step}; to go on: vmamba train --resume {self.folder}"
        )


class Checkpoints(Callback):
    """`last.ckpt` behind every epoch, and before it `best.ckpt` where the score is above all before.

    Lightning's own callback writes the last one only together with the best.

    Args:
        folder: Of the run.
        monitor: The metric that is the score.

    Attributes:
        scores: Of the last evaluation, be it before the run was resumed.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        self.folder, self.monitor = folder / "checkpoints", monitor
        self.best = -math.inf
        self.scores: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        found = trainer.callback_metrics.items()
        self.scores = {name: value.item() for name, value in found if name.startswith("val/")}
        score = self.scores[self.monitor]
        if not score <= self.best:
            self.best = score
            trainer.save_checkpoint(self.folder / "best.ckpt")
        trainer.save_checkpoint(self.folder / "last.ckpt")

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
        self._seen += pl_module.recipe.train.batch_size * trainer.world_size
        pl_module.log(
            "images/s",
            self._seen / (time.perf_counter() - self._start),
            prog_bar=True,
            on_step=True,
            on_epoch=False,
            batch_size=1,
        )


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

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
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
