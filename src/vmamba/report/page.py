"""The page: charts, tables and pictures of runs in one HTML file, which loads nothing from elsewhere."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import vmamba
from vmamba.data.contact_sheet import picture
from vmamba.data.decoding import read_image
from vmamba.errors import DataError, OutputError
from vmamba.files import write_atomically
from vmamba.report import charts, tables
from vmamba.report.charts import Chart, Line
from vmamba.report.records import Judgement, RunRecord
from vmamba.report.tables import Table

MOST_PIXELS = 1600
"""Longer side of a picture in the page."""

CAPTIONS = {
    "confusion.png": "Which class is predicted where which is true; the numbers are in confusion.csv",
    "precision_recall.png": "Precision at each recall; the numbers are in precision_recall.csv",
    "mistakes.png": "The wrong predictions of which the model was surest",
    "worst.png": "The images that were judged worst, truth beside prediction",
    "receptive_field.png": "How strongly each pixel moves the centre of the last feature map",
    "predictions.png": "Images and what was predicted for them",
}
"""What the pictures of known names show."""

_DRAWN_HERE = "curves.png"
"""A run's picture of its metrics, which the charts replace."""


@dataclass(frozen=True)
class Picture:
    """An image in the page, as a data URI; or why it could not be read."""

    caption: str
    data: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Judged:
    """What an evaluation's folder holds."""

    title: str
    command: str
    skipped: Sequence[str]
    tables: Sequence[Table]
    pictures: Sequence[Picture]
    problems: Sequence[str]


@dataclass(frozen=True)
class Chapter:
    """The runs of one task.

    Attributes:
        task: Its name.
        summary: The runs in short.
        charts: Losses and the score that chooses the best checkpoint.
        more_charts: The other columns of metrics.csv.
        metrics: Every evaluation during training, run by run.
        scores: Of the evaluations by full protocol; None without any.
        judged: What else they hold.
        pictures: Of the runs themselves.
        paper: The paper's numbers; None where none apply.
    """

    task: str
    summary: Table
    charts: Sequence[Chart]
    more_charts: Sequence[Chart]
    metrics: Sequence[Table]
    scores: Table | None
    judged: Sequence[Judged]
    pictures: Sequence[Picture]
    paper: Table | None


def write_report(records: Sequence[RunRecord], path: Path) -> None:
    """Write the page of runs.

    Args:
        records: From `read_records`.
        path: Of the HTML file.

    Raises:
        OutputError: It cannot be written.
    """
    text = report_page(records)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error


def report_page(records: Sequence[RunRecord]) -> str:
    """The page of runs, as HTML.

    Args:
        records: At least one, from `read_records`.
    """
    environment = Environment(
        loader=PackageLoader("vmamba.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    names = ", ".join(record.run.name for record in records)
    tasks = dict.fromkeys(record.task for record in records)
    return environment.get_template("report.html").render(
        title=f"{names} – vmamba report",
        names=names,
        date=datetime.now(timezone.utc).isoformat(" ", "seconds").removesuffix("+00:00"),
        version=vmamba.__version__,
        chapters=[_chapter([each for each in records if each.task == task]) for task in tasks],
        settings=tables.settings_table(records),
        recipes=[(record.run.name, record.recipe.to_yaml()) for record in records],
        environment=tables.environment_table(records),
        history=tables.history_table(records),
        chart=charts,
    )


def _chapter(records: Sequence[RunRecord]) -> Chapter:
    all_charts = list(_charts(records))
    monitored = {_split(record.run.score)[1] for record in records}
    main = [each for each in all_charts if each.title == "loss" or each.title in monitored]
    judgements = [(record, judgement) for record in records for judgement in record.judgements]
    return Chapter(
        task=records[0].task,
        summary=tables.runs_table(records),
        charts=main,
        more_charts=[each for each in all_charts if each not in main],
        metrics=[tables.metrics_table(record) for record in records if record.rows],
        scores=tables.scores_table(judgements) if judgements else None,
        judged=[_judged(*each) for each in judgements],
        pictures=[each for record in records for each in _pictures(record.folder, f"{record.run.name}: ")],
        paper=tables.paper_table(records),
    )


def _charts(records: Sequence[RunRecord]) -> Iterator[Chart]:
    """A chart for each metric, of training and validation together."""
    one_row_an_epoch = all(len({row["epoch"] for row in each.rows}) == len(each.rows) for each in records)
    unit = "epoch" if one_row_an_epoch else "step"
    lines: dict[str, list[Line]] = {}
    for number, record in enumerate(records):
        for name in dict.fromkeys(name for row in record.rows for name in row):
            if name in ("epoch", "step"):
                continue
            kind, title = _split(name)
            points = [(row[unit], row[name]) for row in record.rows if name in row]
            label = f"{record.run.name}, {name}" if len(records) > 1 else name
            lines.setdefault(title, []).append(Line(label, number, kind, points))
    drawn = (charts.chart(title, unit, each) for title, each in lines.items())
    return (each for each in drawn if each is not None)


def _split(name: str) -> tuple[str, str]:
    """A metric's kind of line, and what it measures: "val/ema_top1" is "average", "top1"."""
    for prefix, kind in (("val/ema_", "average"), ("val/", "val"), ("train/", "train")):
        if name.startswith(prefix):
            return kind, name.removeprefix(prefix)
    return "val", name


def _judged(record: RunRecord, judgement: Judgement) -> Judged:
    kept, problems = [], []
    for path in sorted(judgement.folder.glob("*.csv")):
        try:
            kept.append(tables.csv_table(path))
        except (OSError, ValueError) as error:
            problems.append(f"{path.name} cannot be read: {error}")
    views = ", averaged over views" if judgement.averaged else ""
    return Judged(
        title=f"{record.run.name}, {judgement.weights} weights{views}",
        command=judgement.command,
        skipped=judgement.skipped,
        tables=kept,
        pictures=list(_pictures(judgement.folder)),
        problems=problems,
    )


def _pictures(folder: Path, title: str = "") -> Iterator[Picture]:
    """The pictures that lie in a folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg") or path.name == _DRAWN_HERE:
            continue
        caption = title + CAPTIONS.get(path.name, path.name)
        try:
            yield Picture(caption, embedded(path))
        except DataError as error:
            yield Picture(caption, problem=str(error))


def embedded(path: Path) -> str:
    """An image file as a data URI, not larger than a page can show.

    Raises:
        DataError: It is damaged.
    """
    image = picture(read_image(path))
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    encodings = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        encodings[kind] = file.getvalue()
    kind = min(encodings, key=lambda each: len(encodings[each]))
    return f"data:image/{kind};base64,{base64.b64encode(encodings[kind]).decode()}"
