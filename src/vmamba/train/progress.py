"""The progress line of a terminal."""

import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

SECONDS_BETWEEN = 0.2
"""Seconds between two updates of the losses, each of which waits for a GPU."""


class ProgressLine(Callback):
    """One line on a terminal for the run: epoch or step, time left, losses, scores, images/s.

    It is not shown if stderr is not a terminal; the log has a line for each evaluation.

    Attributes:
        scores: To show beside the losses, by name.
    """

    def __init__(self) -> None:
        self.scores: dict[str, float] = {}
        self._line: Progress | None = None
        self._drawn = 0.0
        self._batches = self._evaluated = 0

    def _start(self, trainer: lightning.Trainer, description: str, total: int, done: int) -> None:
        console = Console(stderr=True)
        if trainer.is_global_zero and console.is_terminal:
            columns = (
                TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=11)),
                BarColumn(bar_width=8),
                TimeRemainingColumn(compact=True),
                TextColumn("left {task.fields[shown]}", table_column=Column(no_wrap=True)),
            )
            self._line = Progress(*columns, console=console)
            self._line.add_task(description, total=total, completed=done, shown="")
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
        if self._line is None or (now - self._drawn < SECONDS_BETWEEN and not last):
            return
        self._drawn = now
        values = {name: value.item() for name, value in pl_module.losses.items()} | self.scores
        epochs = pl_module.recipe.schedule.epochs
        self._line.update(
            self._line.task_ids[0],
            completed=trainer.global_step,
            description=f"epoch {trainer.current_epoch + 1}/{epochs}"
            if epochs is not None
            else f"step {trainer.global_step}/{pl_module.steps}",
            shown=" ".join(f"{name} {value:.{0 if value >= 10 else 3}f}" for name, value in values.items()),
        )

    def begin_evaluation(self, batches: int) -> None:
        """Show in words how far an evaluation during training is."""
        self._batches, self._evaluated = batches, 0

    def evaluated_batch(self) -> None:
        """One batch of the evaluation is done."""
        self._evaluated += 1
        now = time.perf_counter()
        if self._line is not None and now - self._drawn >= SECONDS_BETWEEN:
            self._drawn = now
            self._line.update(
                self._line.task_ids[0], description=f"evaluating {self._evaluated}/{self._batches}"
            )

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._start(trainer, "evaluating", int(sum(trainer.num_val_batches)), 0)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self._line is not None:
            self._line.advance(self._line.task_ids[0])

    def teardown(self, *_: Any, **__: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()
