"""What a run does at its milestones: evaluate, write a row of metrics.csv, keep checkpoints."""

import logging
import math
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from vmamba.train.best import write_best
from vmamba.train.checkpoint import earlier_checkpoints, keep_as, remove_checkpoint, step_path
from vmamba.train.curves import add_row, draw_curves, read_metrics
from vmamba.train.means import gather
from vmamba.train.optim import base_rate
from vmamba.train.progress import ProgressLine
from vmamba.train.stop import at_step
from vmamba.words import counted

log = logging.getLogger(__name__)


class Checkpoints:
    """Writes `last.ckpt` and `best.ckpt`.

    Earlier ones are kept under their step's number, in case the newest is damaged. Lightning's own callback
    writes the last one only together with the best.

    Args:
        folder: Of the run.
        keep: How many of the newest to keep.
        resumed_from: The checkpoint in the folder that the run is resumed from.
    """

    def __init__(self, folder: Path, keep: int, resumed_from: Path | None = None) -> None:
        self.run, self.folder, self.keep = folder, folder / "checkpoints", keep
        self.resumed_from = resumed_from
        self._last_step: int | None = None  # of last.ckpt, if that is complete

    def started(self, trainer: lightning.Trainer) -> None:
        """Remember the step that the run is resumed at."""
        if self.resumed_from == self.folder / "last.ckpt":
            self._last_step = trainer.global_step

    def save(self, trainer: lightning.Trainer) -> None:
        """Write last.ckpt, unless it is of this very step."""
        if self._last_step == trainer.global_step:
            return
        last = self.folder / "last.ckpt"
        if trainer.is_global_zero and self._last_step is not None:
            keep_as(last, step_path(last, self._last_step))
            for path in earlier_checkpoints(self.folder)[self.keep - 1 :]:
                remove_checkpoint(path)
        trainer.save_checkpoint(last)
        self._last_step = trainer.global_step

    def save_best(self, trainer: lightning.Trainer, module: Any) -> None:
        """Write best.ckpt, and its weights as best.safetensors with config.json."""
        best = self.folder / "best.ckpt"
        trainer.save_checkpoint(best)
        if trainer.is_global_zero:
            write_best(best, module.contents["config"], module.model, self.run)


class Milestones(Callback):
    """After every epoch or every `eval_every_steps`, and after the last step: evaluate and write checkpoints.

    Args:
        folder: Of the run.
        validation: The loader of the split "val".
        checkpoints: Writes them.
        progress: The line on the terminal.

    Attributes:
        scores: Of the last evaluation, even if that was before the run was resumed.
        best: The best score so far, by the task's monitor; None before the first evaluation.
        best_step: The step of the best score.
        stale: Evaluations since the best score.
    """

    def __init__(
        self, folder: Path, validation: Any, checkpoints: Checkpoints, progress: ProgressLine
    ) -> None:
        self.folder, self.validation = folder, validation
        self.checkpoints, self.progress = checkpoints, progress
        self.scores: dict[str, float] = {}
        self.best: float | None = None
        self.best_step, self.stale = 0, 0
        self._images, self._seconds, self._since = 0, 0.0, 0.0
        self._first_of_epoch: tuple[int, float] | None = None  # images and seconds of the first batch
        self._module: Any = None
        self._restored_means: dict[str, tuple[float, float]] = {}
        self._left_out: dict[str, None] = {}

    def setup(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        self._module = pl_module

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self.checkpoints.started(trainer)
        if trainer.is_global_zero:  # the restored means are those of all processes together
            pl_module.means.restore(self._restored_means)
        self._stop_if_done(trainer, pl_module)
        self._since = time.perf_counter()

    def on_train_epoch_start(self, *_: Any) -> None:
        self._first_of_epoch = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        images, seconds = len(batch.indices) * trainer.world_size, now - self._since
        if self._first_of_epoch is None:
            self._first_of_epoch = images, seconds
        else:
            self._images += images
            self._seconds += seconds
        self._since = now
        self.progress.scores["images/s"] = self._images_per_second()
        self._tell_left_out(trainer.train_dataloader)
        if at_step(trainer):
            if trainer.global_step % pl_module.recipe.train.log_every == 0:
                self._log(trainer, {f"train/{n}_step": v.item() for n, v in pl_module.losses.items()})
            if not trainer.is_last_batch:  # after the last batch `on_train_epoch_end` does it
                self._after_step(trainer, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.is_last_batch:  # otherwise the run was stopped within the epoch
            self._after_step(trainer, pl_module)

    def _images_per_second(self) -> float:
        """Speed of training since the last row of metrics.csv.

        The first batch of an epoch does not count, if there are others: it waits for the workers to start and
        for what PyTorch sets up in the first step, which in a short epoch may take most of the time.
        """
        images, seconds = (self._images, self._seconds) if self._images else (self._first_of_epoch or (0, 0))
        return images / max(seconds, 1e-9)

    def _after_step(self, trainer: lightning.Trainer, module: Any) -> None:
        step, train = trainer.global_step, module.recipe.train
        due = trainer.is_last_batch if train.eval_every_steps is None else step % train.eval_every_steps == 0
        if due or step == module.steps:
            self._evaluate(trainer, module)
        elif train.checkpoint_every is not None and step % train.checkpoint_every == 0:
            self.checkpoints.save(trainer)
        self._since = time.perf_counter()

    def _evaluate(self, trainer: lightning.Trainer, module: Any) -> None:
        self.progress.begin_evaluation(len(self.validation))
        self.scores = module.evaluate(self.validation, self.progress.evaluated_batch)
        self._tell_left_out(self.validation)
        score = self.scores[module.monitor]
        self.progress.scores[module.monitor] = score
        improved = self._is_better(score, module.task.monitor_mode)
        if improved:
            self.best, self.best_step, self.stale = score, trainer.global_step, 0
        else:
            self.stale += 1
        self._write_row(trainer, module)
        if improved:
            self.checkpoints.save_best(trainer, module)
        self.checkpoints.save(trainer)
        self._stop_if_done(trainer, module)

    def _stop_if_done(self, trainer: lightning.Trainer, module: Any) -> None:
        """End the run after its last step, which may be within an epoch, or where patience has run out."""
        patience = module.recipe.schedule.patience
        trainer.should_stop = trainer.global_step >= module.steps
        if not trainer.should_stop and patience is not None and self.stale >= patience:
            evaluations = counted(self.stale, "evaluation")
            log.info("stopped early: %s without a better %s", evaluations, module.monitor)
            trainer.should_stop = True

    def _is_better(self, score: float, mode: str) -> bool:
        if self.best is None or math.isnan(self.best):
            return True
        return score > self.best if mode == "max" else score < self.best

    def _write_row(self, trainer: lightning.Trainer, module: Any) -> None:
        means = {f"train/{name}": value for name, value in module.means.means().items()}
        values = {"images/s": self._images_per_second(), **means, **self.scores}
        if module.recipe.train.on_error == "skip":
            values["skipped/samples"] = sum(gather(len(self._left_out)))
        if module.recipe.train.on_nonfinite == "skip":
            values["skipped/steps"] = module.skipped_steps
        module.means.reset()
        self._images, self._seconds = 0, 0.0
        epoch, step = trainer.current_epoch + 1, trainer.global_step
        if trainer.is_global_zero:
            rate = base_rate(trainer.optimizers[0])
            shown = {name: f"{value:.6g}" for name, value in sorted(values.items())}
            row = {"epoch": epoch, "step": step, "lr": f"{rate:.6g}", **shown}
            add_row(self.folder / "metrics.csv", row)
        self._log(trainer, values)
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("epoch %d, step %d of %d: %s", epoch, step, module.steps, text)

    def _log(self, trainer: lightning.Trainer, values: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _tell_left_out(self, loader: Any) -> None:
        for message in loader.skipped:
            if message not in self._left_out:
                self._left_out[message] = None
                log.warning("left out: %s", message)

    def on_fit_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        path = self.folder / "metrics.csv"
        if trainer.is_global_zero and path.exists():
            try:
                draw_curves(read_metrics(path), self.folder / "curves.png")
            except OSError as error:  # such as a full disk; a picture must not hide why the run ended
                log.warning("curves.png could not be written: %s", error)

    def on_exception(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.on_fit_end(trainer)

    def state_dict(self) -> dict[str, Any]:
        state = {"best": self.best, "best_step": self.best_step, "stale": self.stale, "scores": self.scores}
        means = {name: list(totals) for name, totals in self._module.means.totals().items()}
        return {**state, "means": means, "images": self._images, "seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in ("best", "best_step", "stale", "scores"):
            setattr(self, name, state_dict[name])
        self._restored_means = {name: tuple(totals) for name, totals in state_dict["means"].items()}
        self._images, self._seconds = state_dict["images"], state_dict["seconds"]
