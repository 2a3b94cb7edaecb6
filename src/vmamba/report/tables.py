"""Tables of a report: runs, their recipes and machines, evaluations, and the paper's numbers."""

import csv
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmamba.report.paper import TABLES, Column, PaperTable
from vmamba.report.records import Judgement, RunRecord

MEASURED, QUOTED = "measured", "quoted"

MOST_ROWS = 100
"""Rows of a CSV file that a report shows."""


@dataclass(frozen=True)
class Cell:
    """A value of a table.

    Attributes:
        text: To show.
        mark: Where the value comes from, "measured" or "quoted"; empty where that is plain.
    """

    text: str
    mark: str = ""

    @property
    def is_number(self) -> bool:
        """Whether it is set to the right."""
        return self.text[:1].isdigit() or self.text[:2].lstrip("-").isdigit()


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        caption: What it shows.
        columns: Titles.
        rows: Cells.
        note: Below it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


def runs_table(records: Sequence[RunRecord]) -> Table:
    """The runs in short, a column for each."""
    facts = [_facts(record) for record in records]
    rows = [[Cell(name), *(Cell(each[name]) for each in facts)] for name in facts[0]]
    return Table("The runs in short", ["", *(record.run.name for record in records)], rows)


def _facts(record: RunRecord) -> dict[str, str]:
    run = record.run
    done = run.epochs if run.unit == "epochs" else run.step
    best = "" if run.best is None else f"{run.best:.4f} in epoch {run.best_epoch}"
    return {
        "folder": str(record.folder),
        "model": run.model,
        "classes": "" if record.classes is None else f"{len(record.classes):,}",
        "parameters": "" if record.parameters is None else f"{record.parameters:,}",
        "state": run.state,
        "length": f"{done:,} of {run.length:,} {run.unit}",
        "chosen by": run.score,
        "best": best,
        "last": _number(run.last),
        "training loss": _number(run.train_loss),
        "validation loss": _number(run.val_loss),
        "images/s in training": "" if run.images_per_second is None else f"{run.images_per_second:.1f}",
        "last evaluation": run.changed,
    }


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def metrics_table(record: RunRecord) -> Table:
    """metrics.csv."""
    columns = list(dict.fromkeys(name for row in record.rows for name in row))
    rows = [[Cell(f"{row[name]:g}" if name in row else "") for name in columns] for row in record.rows]
    return Table(f"Every evaluation of {record.run.name} (metrics.csv)", columns, rows)


def settings_table(records: Sequence[RunRecord]) -> Table | None:
    """The settings in which the recipes differ, a column for each run; None if there are none."""
    settings = [record.recipe.settings() for record in records]
    keys = list(dict.fromkeys(key for each in settings for key in each))
    rows = []
    for key in keys:
        texts = [_plain(each[key]) if key in each else "–" for each in settings]
        if len(set(texts)) > 1:
            rows.append([Cell(key), *map(Cell, texts)])
    if not rows:
        return None
    return Table("What the recipes differ in", ["setting", *(each.run.name for each in records)], rows)


def environment_table(records: Sequence[RunRecord]) -> Table:
    """env.json of each run."""
    keys = list(dict.fromkeys(key for record in records for key in record.environment))
    rows = [[Cell(key), *(Cell(_plain(each.environment.get(key, ""))) for each in records)] for key in keys]
    return Table("Software and hardware of the training", ["", *(each.run.name for each in records)], rows)


def history_table(records: Sequence[RunRecord]) -> Table:
    """When the runs were started and resumed."""
    rows = []
    for record in records:
        for event in record.history:
            changes = ", ".join(
                f"{key}: {_plain(old)} → {_plain(new)}"
                for key, (old, new) in event.get("changes", {}).items()
            )
            command = shlex.join(map(str, event.get("command", [])))
            values = (event.get("date", ""), event.get("step", ""), command, changes)
            rows.append([Cell(record.run.name), *(Cell(str(value)) for value in values)])
    return Table("Starts and resumptions", ["run", "date", "at step", "command", "changed settings"], rows)


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value:
        return "; ".join(f"{key}: {_plain(each)}" for key, each in value.items())
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return shlex.join(value)
    return json.dumps(value, ensure_ascii=False)


def scores_table(judgements: Sequence[tuple[RunRecord, Judgement]]) -> Table:
    """A row for each evaluation."""
    names = list(dict.fromkeys(name for _, each in judgements for name in each.scores))
    rows = []
    for record, each in judgements:
        how = f"{each.weights} weights{', averaged over views' if each.averaged else ''}"
        outdated = "" if each.date >= _last_start(record) else " (before the run was resumed)"
        cells = [
            record.run.name,
            how,
            f"{each.date}{outdated}",
            f"{each.samples:,}",
            f"{len(each.skipped):,}",
        ]
        scores = [_number(each.scores.get(name)) for name in names]
        rows.append([Cell(text) for text in (*cells, *scores)])
    return Table("Scores", ["run", "judged", "date", "samples", "left out", *names], rows)


def _last_start(record: RunRecord) -> str:
    return max((str(event.get("date", "")) for event in record.history), default="")


def csv_table(path: Path) -> Table:
    """A CSV file; of a long one the first rows.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a table as text.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            columns, *rows = csv.reader(file)
        except csv.Error as error:
            raise ValueError(str(error)) from error
    note = f"The first {MOST_ROWS} of {len(rows):,} rows." if len(rows) > MOST_ROWS else ""
    return Table(path.name, columns, [list(map(Cell, row)) for row in rows[:MOST_ROWS]], note)


def paper_table(records: Sequence[RunRecord]) -> Table | None:
    """The runs of one task above the rows of the paper that apply to them; None if none do.

    All rows apply to runs on the paper's data, which are known by their number of classes. To other runs only
    what their own model costs applies.
    """
    table = TABLES.get(records[0].task)
    if table is None:
        return None
    on_papers_data = [record for record in records if len(record.classes or ()) == table.classes]
    names = {record.run.model.partition(".")[0] for record in records}
    if on_papers_data:
        rows, columns = table.rows, table.columns
    else:
        rows, columns = tuple(row for row in table.rows if names.intersection(row.models)), ()
    if not rows:
        return None
    cells = [
        _measured_row(record, columns if record in on_papers_data else (), columns) for record in records
    ]
    cells += [
        [
            Cell(f"{row.name}{' – this model' if names.intersection(row.models) else ''}"),
            Cell(f"{row.parameters:g} M", QUOTED),
            Cell("" if row.gmacs is None else f"{row.gmacs:g}", QUOTED),
            *(Cell(f"{row.scores[column.title]:g}", QUOTED) for column in columns),
        ]
        for row in rows
    ]
    note = (
        "The paper's accuracies are of its own test images; compare a run's that was judged on the same."
        if on_papers_data
        else "No accuracy is set beside: the paper's are of other data than these runs'."
    )
    titles = ["model", "parameters", "GMACs", *(column.title for column in columns)]
    return Table(_paper_caption(table), titles, cells, note)


def _paper_caption(table: PaperTable) -> str:
    return f"The paper's {table.caption}, below these runs"


def _measured_row(record: RunRecord, scored: Sequence[Column], columns: Sequence[Column]) -> list[Cell]:
    macs, size = record.macs, record.input_size
    gmacs = "" if macs is None or size is None else f"{macs / 1e9:.2f} at {size[1]}×{size[2]}"
    values = [_score(record, column) if column in scored else None for column in columns]
    return [
        Cell(f"{record.run.name} ({record.run.model})"),
        Cell("" if record.parameters is None else f"{record.parameters / 1e6:.1f} M", MEASURED),
        Cell(gmacs, MEASURED),
        *(Cell("" if value is None else f"{100 * value:.2f}", MEASURED) for value in values),
    ]


def _score(record: RunRecord, column: Column) -> float | None:
    """From the newest evaluation of that kind; else the best during training, if it is not averaged."""
    for judgement in reversed(record.judgements):
        if judgement.averaged == column.averaged and column.score in judgement.scores:
            return judgement.scores[column.score]
    is_monitored = record.run.score.removeprefix("val/").removeprefix("ema_") == column.score
    return record.run.best if is_monitored and not column.averaged else None
