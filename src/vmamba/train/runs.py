"""Runs below a folder, side by side."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from vmamba.errors import DataError, RecipeError
from vmamba.train.callbacks import read_metrics
from vmamba.train.recipe import read_values


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
        best_epoch: Which that was, from 1.
        train_loss: Of the last epoch.
        images_per_second: In training, in the last epoch.
        changed: When the last row was written.
        problem: Why the folder cannot be read; the rest is empty then.
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
    images_per_second: float | None = None
    changed: str = ""
    problem: str = ""


SORTS = ("name", "model", "epochs", "last", "best", "train_loss", "images_per_second", "changed")
"""By which runs can be sorted: names upwards, numbers and dates downwards."""


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
    if sort in ("name", "model"):
        return sorted(runs, key=lambda run: getattr(run, sort))
    known = [run for run in runs if getattr(run, sort) not in (None, "")]
    rest = [run for run in runs if getattr(run, sort) in (None, "")]
    return sorted(known, key=lambda run: getattr(run, sort), reverse=True) + rest


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
        ema = values["train"].get("ema_decay") is not None
        file = place / "metrics.csv"
        rows = read_metrics(file)
        if not rows:
            return Run(name, model, of=epochs)
        scores = [key for key in rows[-1] if key.startswith("val/")]
        chosen = _monitor(scores, ema)
        found = [(_number(row, chosen), int(row["epoch"]) + 1) for row in rows]
        best, at = max(((score, epoch) for score, epoch in found if score is not None), default=(None, None))
        return Run(
            name,
            model,
            epochs=int(rows[-1]["epoch"]) + 1,
            of=epochs,
            step=int(rows[-1]["step"]),
            score=chosen,
            last=found[-1][0],
            best=best,
            best_epoch=at,
            train_loss=_number(rows[-1], "train/loss"),
            images_per_second=_number(rows[-1], "images/s"),
            changed=datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M"),
        )
    except RecipeError as error:
        return Run(name, problem=str(error))
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        return Run(name, problem=f"{place}: not a run of vmamba, or a damaged one ({error!r})")


def _monitor(scores: list[str], ema: bool) -> str:
    """The score by which the best checkpoint was chosen: the task's first, of the average if there is one."""
    own = [score for score in scores if score.startswith("val/ema_") == ema]
    return own[0] if own else ""


def _number(row: dict[str, str], name: str) -> float | None:
    value: Any = row.get(name)
    return float(value) if value else None
