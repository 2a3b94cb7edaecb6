"""A study's results as files: JSON with the hardware, a table in Markdown and in CSV, and the figure."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vmamba.environment import environment
from vmamba.files import replacing, write_atomically
from vmamba.studies.study import COLUMNS, INFERENCE, TRAINING, Conditions, Row, Speed, Study

FILES = ("results.json", "table.md", "table.csv", "figure.png")
"""What is written into a study's folder."""

ACCURACY = "accuracy.md"
"""The table of the patterns that were trained, beside these."""


def write_results(study: Study, rows: Sequence[Row], conditions: Conditions, folder: Path) -> None:
    """Write all files of a study, each of them whole or not at all.

    Args:
        study: What was studied.
        rows: What is known of its subjects.
        conditions: How they were measured.
        folder: Created if it is missing.

    Raises:
        OSError: A file cannot be written.
    """
    facts = environment()
    contents = {
        "study": study.title,
        "environment": facts,
        "conditions": asdict(conditions),
        "ratio": "speed of the group's first subject over that of the row's: median and quartiles",
        "rows": [asdict(row) for row in rows],
        "summary": remarks(study, rows),
    }
    results, markdown, table, figure = (folder / name for name in FILES)
    write_atomically(results, json.dumps(contents, indent=2) + "\n")
    write_atomically(markdown, _markdown(study, rows, _described(conditions, facts)))
    write_atomically(table, _csv(rows))
    with replacing(figure) as temporary:
        study.draw(rows, temporary)


def remarks(study: Study, rows: Sequence[Row]) -> list[str]:
    """Lines below the table: the study's summary, and the groups whose first subject was not measured."""
    lines = study.summary(rows)
    speeds = {row.subject.key: row.speeds for row in rows}
    for column in (INFERENCE, TRAINING):
        for first, *others in study.groups:
            timed = [each.key for each in (first, *others) if column in speeds.get(each.key, {})]
            if timed and timed[0] != first.key:
                kind = column.split(",")[0]
                lines.append(f"{kind}: {first.key}, was not measured; its group is relative to {timed[0]}")
    return lines


def _described(conditions: Conditions, facts: dict[str, object]) -> str:
    gpus = facts["gpus"]
    where = (
        f"{facts['processor']}, {conditions.device}, threads: {facts['threads']}"
        if conditions.device == "cpu"
        else f"{', '.join(map(str, gpus)) if isinstance(gpus, list) else conditions.device}"
    )
    types = f"training in {conditions.autocast or 'float32'}" if conditions.train else "no training"
    return (
        f"{where}; batch {conditions.batch}, rounds in turns: {conditions.rounds}, inference in float32, "
        f"{types}; PyTorch {facts['torch']}, vmamba {facts['vmamba']}, {str(facts['date'])[:10]}"
    )


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns in which something was measured or is quoted."""
    return [c for c in COLUMNS if any(c in row.measured or c in row.subject.quoted for row in rows)]


def ratio_text(speed: Speed | None) -> str:
    """The ratio to the first subject, with its quartiles."""
    if speed is None:
        return ""
    ratio = speed.ratio
    return f"{1 / ratio.median:.2f} × ({1 / ratio.high:.2f} to {1 / ratio.low:.2f})"


def number(value: float | None) -> str:
    """A value with four significant digits, and at most three decimals."""
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, min(3, 3 - len(str(int(value)))))}f}" if value >= 1 else f"{value:.3f}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table of a study, titles first; what is quoted has a column of its own beside what was measured."""
    lines = [["", "size"], *([row.subject.label, f"{row.subject.size}²"] for row in rows)]
    for column in columns_of(rows):
        _add(lines, column, [number(row.measured.get(column)) for row in rows])
        if any(column in row.subject.quoted for row in rows):
            _add(lines, "quoted", [number(row.subject.quoted.get(column)) for row in rows])
        if column in (INFERENCE, TRAINING):
            _add(lines, "relative", [ratio_text(row.speeds.get(column)) for row in rows])
    return lines


def _add(lines: Sequence[list[str]], title: str, values: Sequence[str]) -> None:
    for line, value in zip(lines, [title, *values], strict=True):
        line.append(value)


def _markdown(study: Study, rows: Sequence[Row], described: str) -> str:
    titles, *body = cells(rows)
    lines = [f"# {study.title}", "", described + ". *Quoted*: the paper's values, on an A100.", ""]
    lines += [_line(titles), _line(["---", *["---:" for _ in titles[1:]]]), *map(_line, body)]
    notes = [f"- {row.subject.key}, {note}" for row in rows for note in row.notes]
    if notes:
        lines += ["", "Not measured:", "", *notes]
    lines += [part for line in remarks(study, rows) for part in ("", line)]
    return "\n".join(lines) + "\n"


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _csv(rows: Sequence[Row]) -> str:
    columns = columns_of(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    quoted = [f"{column} (quoted)" for column in columns]
    relative = [f"{column} (relative)" for column in (INFERENCE, TRAINING) if column in columns]
    writer.writerow(["label", "model", "size", *columns, *relative, *quoted, "notes"])
    for row in rows:
        writer.writerow(
            [
                row.subject.label,
                row.subject.model,
                row.subject.size,
                *(row.measured.get(column, "") for column in columns),
                *(
                    1 / row.speeds[column].ratio.median if column in row.speeds else ""
                    for column in (INFERENCE, TRAINING)
                    if column in columns
                ),
                *(row.subject.quoted.get(column, "") for column in columns),
                "; ".join(row.notes),
            ]
        )
    return text.getvalue()


def write_report(folder: Path, names: Sequence[str]) -> Path:
    """One page of the studies in a folder, their tables and figures below each other; returns its path.

    Args:
        folder: With a folder for each study.
        names: Of the studies, in the order of the page; those that the folder lacks are left out.
    """
    parts = ["# The paper's studies, measured here\n"]
    for name in names:
        if not (folder / name / "table.md").exists():
            continue
        table = (folder / name / "table.md").read_text(encoding="utf-8")
        title = table.partition("\n")[0].removeprefix("# ")
        parts.append(f"#{table}\n![{title}]({name}/figure.png)\n")
        if (folder / name / ACCURACY).exists():
            parts.append("### Trained alike\n\n" + (folder / name / ACCURACY).read_text(encoding="utf-8"))
    path = folder / "report.md"
    write_atomically(path, "\n".join(parts))
    return path
