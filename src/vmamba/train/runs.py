"""List the runs below a folder."""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vmamba.errors import DataError, RecipeError
from vmamba.train.curves import read_metrics
from vmamba.train.module import monitored
from vmamba.train.recipe import check, read_values
from vmamba.train.stop import holds_run
from vmamba.train.tasks import task_type


@dataclass(frozen=True)
class Run:
    """One run, as its folder describes it.

    Attributes:
        name: Its folder, relative to the one searched.
        model: Name of the model.
        epochs: Epochs begun at the last evaluation.
        length: Planned length, in `unit`.
        unit: "epochs" or "steps", in which the recipe gives the length.
        step: Optimiser steps done at the last evaluation.
        score: Name of the score in `last` and `best`.
        last: Score of the last evaluation.
        best: Best score so far.
        best_epoch: Epoch of the best score, from 1; the first one of equal scores, as for best.ckpt.
        train_loss: Mean between the last two evaluations.
        val_loss: Of the last evaluation, if the task has one.
        images_per_second: In training, between the last two evaluations.
        changed: When the last row of metrics.csv was written.
        state: "finished", "unfinished", or "no checkpoint" if there is none to resume or evaluate.
        problem: Why the folder cannot be read, in one line; the other attributes are empty then.
    """

    name: str
    model: str = ""
    epochs: int = 0
    length: int = 0
    unit: str = "epochs"
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
"""Keys to sort runs by: names and losses ascending, other numbers and dates descending."""


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
    sortable = [run for run in runs if getattr(run, sort) not in (None, "")]
    rest = [run for run in runs if getattr(run, sort) in (None, "")]
    return sorted(sortable, key=lambda run: getattr(run, sort), reverse=sort not in _UPWARDS) + rest


def _places(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("env.json")):  # a recipe.yaml may lie anywhere
        if (file.parent / "recipe.yaml").exists():
            yield file.parent


def _name(place: Path, folder: Path) -> str:
    return folder.resolve().name if place == folder else str(place.relative_to(folder))


def _read(place: Path, name: str) -> Run:
    try:
        return read_run(place, name)
    except DataError as error:
        return Run(name, state="", problem=str(error))


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder.

    Args:
        folder: Of the run.
        name: To call it by.

    Raises:
        DataError: The folder is not a run, or a file that describes it is damaged.
    """
    try:
        return _described(folder, name)
    except RecipeError as error:
        reason = str(error)
    except (KeyError, TypeError, ValueError, AttributeError, OSError, csv.Error) as error:
        reason = repr(error)
    reason = " ".join(reason.split())
    raise DataError(f"{folder}: not a run of vmamba, or a damaged one ({reason})")


def _described(place: Path, name: str) -> Run:
    values, _ = read_values(place / "recipe.yaml")
    task = task_type(values.get("task"))
    recipe = check(task.recipe_type, values, str(place / "recipe.yaml"))
    schedule, score = recipe.schedule, monitored(task, recipe)
    unit, length = ("steps", schedule.steps) if schedule.epochs is None else ("epochs", schedule.epochs)
    assert length is not None
    file = place / "metrics.csv"
    rows = read_metrics(file)
    if not rows:
        return Run(name, recipe.model.name, length=length, unit=unit)
    last = rows[-1]
    epochs, step = int(last["epoch"]), int(last["step"])
    scored = [(value, int(row["epoch"])) for row in rows if (value := _number(row, score)) is not None]
    sign = 1 if task.monitor_mode == "max" else -1
    best, best_epoch = max(scored, key=lambda each: (sign * each[0], -each[1]), default=(None, None))
    finished = (step if unit == "steps" else epochs) >= length
    state = "finished" if finished else "unfinished"
    return Run(
        name,
        recipe.model.name,
        epochs=epochs,
        length=length,
        unit=unit,
        step=step,
        score=score,
        last=_number(last, score),
        best=best,
        best_epoch=best_epoch,
        train_loss=_number(last, "train/loss"),
        val_loss=_number(last, "val/loss"),
        images_per_second=_number(last, "images/s"),
        changed=datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
        state=state if holds_run(place) else "no checkpoint",
    )


def _number(row: dict[str, str], name: str) -> float | None:
    """A number of a row, if it has it and it is finite."""
    value: Any = row.get(name)
    number = float(value) if value else math.nan
    return number if math.isfinite(number) else None
