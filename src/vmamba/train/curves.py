"""`metrics.csv`, a row for each evaluation, and `curves.png` from it."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmamba.errors import OutputError, RecipeError
from vmamba.files import save_figure, write_atomically


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a `metrics.csv`; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check_metrics(path: Path) -> None:
    """Make sure that rows can be added to a `metrics.csv`, if there is one.

    Raises:
        RecipeError: It is a folder, or a file of another kind.
    """
    try:
        rows = read_metrics(path)
        readable = all(row["epoch"].isdecimal() and row["step"].isdecimal() for row in rows)
    except (OSError, ValueError, KeyError, AttributeError, csv.Error):
        readable = False
    if not readable:
        raise RecipeError(
            f"{path}: not the metrics of a run of vmamba; move it away, or name another folder for the run"
        )


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row and remove those of the same and later steps, which a resumed run repeats.

    Args:
        path: Of `metrics.csv`.
        row: With "epoch", from 1, and "step".

    Raises:
        OutputError: The file cannot be written.
    """
    rows = [each for each in read_metrics(path) if int(each["step"]) < row["step"]]
    rows.append({name: str(value) for name, value in row.items()})
    columns = list(dict.fromkeys(name for each in rows for name in each))
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns)
    writer.writeheader()
    writer.writerows(rows)
    try:
        write_atomically(path, table.getvalue())
    except OSError as error:
        raise OutputError(f"{path}: could not be written ({error})") from error


def draw_curves(rows: list[dict[str, str]], path: Path) -> None:
    """Draw a PNG, losses above and scores below, over epochs, or over steps if an epoch has several rows."""
    from cycler import cycler
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    unit = "epoch" if len({row["epoch"] for row in rows}) == len(rows) else "step"
    figure = Figure(figsize=(8.5, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    for axes in (upper, lower):  # a detector has 14 scores, more than there are colours
        axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * rcParams["axes.prop_cycle"])
    for name in dict.fromkeys(name for row in rows for name in row):
        if name.startswith(("train/", "val/")):
            points = [(int(row[unit]), float(row[name])) for row in rows if row.get(name)]
            axes = upper if "loss" in name else lower
            axes.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3)
    upper.set_ylabel("loss")
    lower.set(xlabel=unit, ylabel="score")
    lower.xaxis.get_major_locator().set_params(integer=True)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    save_figure(figure, path, dpi=120)
