"""Runs below a folder, side by side."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vmamba.errors import DataError, RecipeError
from vmamba.train.callbacks import read_metrics
from vmamba.train.recipe import read_values
from vmamba.train.task import task_type


@dataclass(frozen=True)
class Run:
    """What a run's folder says.

    Attributes:
        name: The folder, from where was looked.
        model: Its name.
        epochs: Done.
        of: Planned.
        step: Of the optimiser, at the last row.
        score: The name of the scores that follow.
        last: Of the last epoch.
        best: Of the best.
        best_epoch: Which that was, from 1; of equals the first, as best.ckpt is.
        train_loss: Of the last epoch.
        val_loss: Of the last epoch, if the task has one.
        images_per_second: In training, in the last epoch.
        changed: When the last row was written.
        state: "finished" or "unfinished".
        problem: Why the folder cannot be read, in one line; the rest is empty then.
    """

    name: str
    model: str = ""
    epochs: int = 0
    of: int = 0
    step: int = 0
    score: str = ""
    last: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    images_per_second: float | None = None
    changed: str = ""
    state: str = "unfinished"
    problem: str = ""


_UPWARDS = ("name", "model", "state", "train_loss", "val_loss")
SORTS = (*_UPWARDS, "epochs", "step", "last", "best", "images_per_second", "changed")
"""By which runs can be sorted: names and losses upwards, other numbers and dates downwards."""


def find_runs(folder: str | Path, sort: str = "name") -> list[Run]:
    """Every run below a folder; one that cannot be read has its `problem`.

    Args:
        folder: Where to look; it may be a run itself.
        sort: One of `SORTS`.

    Raises:
        DataError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if sort not in SORTS:
        raise DataError(f"no order {sort!r}; there are {', '.join(SORTS)}")
    runs = [_read(place, _name(place, folder)) for place in _places(folder)]
    known = [run for run in runs if getattr(run, sort) not in (None, "")]
    rest = [run for run in runs if getattr(run, sort) in (None, "")]
    return sorted(known, key=lambda run: getattr(run, sort), reverse=sort not in _UPWARDS) + rest


def _places(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("env.json")):  # a recipe.yaml may lie anywhere
        if (file.parent / "recipe.yaml").exists():
            yield file.parent


def _name(place: Path, folder: Path) -> str:
    return folder.resolve().name if place == folder else str(place.relative_to(folder))


def _read(place: Path, name: str) -> Run:
    try:
        values, _ = read_values(place / "recipe.yaml")
        model, epochs = values["model"]["name"], values["schedule"]["epochs"]
        monitor = task_type(values["task"]).monitor
        ema = values["train"].get("ema_decay") is not None
        chosen = f"val/ema_{monitor}" if ema else f"val/{monitor}"
        if not isinstance(model, str) or not isinstance(epochs, int):
            raise TypeError(f"model.name {model!r}, schedule.epochs {epochs!r}")
        file = place / "metrics.csv"
        rows = read_metrics(file)
        if not rows:
            return Run(name, model, of=epochs)
        found = [(_number(row, chosen), int(row["epoch"]) + 1) for row in rows]
        best, at = max(
            ((score, epoch) for score, epoch in found if score is not None),
            key=lambda each: (each[0], -each[1]),
            default=(None, None),
        )
        return Run(
            name,
            model,
            epochs=found[-1][1],
            of=epochs,
            step=int(rows[-1]["step"]),
            score=chosen,
            last=found[-1][0],
            best=best,
            best_epoch=at,
            train_loss=_number(rows[-1], "train/loss"),
            val_loss=_number(rows[-1], "val/loss"),
            images_per_second=_number(rows[-1], "images/s"),
            changed=datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
            state="finished" if found[-1][1] >= epochs else "unfinished",
        )
    except RecipeError as error:
        reason = str(error)
    except (KeyError, TypeError, ValueError, AttributeError, OSError, csv.Error) as error:
        reason = repr(error)
    reason = " ".join(reason.split())
    return Run(name, state="", problem=f"{place}: not a run of vmamba, or a damaged one ({reason})")


def _number(row: dict[str, str], name: str) -> float | None:
    """A number of a row, if it has it and it is finite."""
    value: Any = row.get(name)
    number = float(value) if value else math.nan
    return number if math.isfinite(number) else None
