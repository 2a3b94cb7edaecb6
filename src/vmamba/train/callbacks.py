"""What a run writes and shows beside its checkpoints."""

import csv
import io
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, RichProgressBar

from vmamba.errors import UserError
from vmamba.train.checkpoint import write_atomically


class Interrupted(UserError):
    """The run was stopped by a signal, behind a whole step and with a checkpoint."""


class StopOnInterrupt(Callback):
    """At the first Ctrl-C, finish the step, write `last.ckpt` and raise `Interrupted`; at the second, stop at once.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked = False
        self._before: Any = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._before = signal.signal(signal.SIGINT, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self.asked:
            trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
            raise Interrupted(
                f"interrupted after step {trainer.global_step}; to go on: vmamba train --resume {self.folder}"
            )

    def teardown(self, trainer: lightning.Trainer, pl_module: Any, stage: str) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


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
        write_atomically(self.path, lambda file: file.write(table.getvalue().encode()))

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
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


class RunProgressBar(RichProgressBar):
    """Lightning's bar: loss, scores, images/s, elapsed and remaining time; the version number left out."""

    def get_metrics(self, trainer: lightning.Trainer, pl_module: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name: value for name, value in metrics.items() if not name.endswith("_epoch")}


def progress_bar() -> list[Callback]:
    """The bar, unless `VMAMBA_PROGRESS=0`."""
    return [] if os.environ.get("VMAMBA_PROGRESS") == "0" else [RunProgressBar(leave=True)]
