"""`vmamba eval`."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Weights(str, Enum):
    auto = "auto"
    raw = "raw"
    ema = "ema"
    both = "both"


def command(
    what: Annotated[
        Path,
        typer.Argument(
            help="A run's folder (its best.ckpt), a checkpoint or best.safetensors of a run, or a recipe "
            "whose model.weights to judge."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, laid over the recipe.", show_default=False),
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(
            help="As trained, their average, both, or the average where a run's checkpoint has one."
        ),
    ] = Weights.auto,
    flip: Annotated[bool, typer.Option("--flip", help="Average over mirror images too.")] = False,
    scales: Annotated[
        str, typer.Option(help="Average over views of these sizes, over the recipe's, such as 0.9,1,1.1.")
    ] = "1",
    per_class: Annotated[bool, typer.Option("--per-class", help="Show a row for each class.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for the results: scores, tables, pictures, every prediction, and the mistakes.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge weights on the evaluation split of their recipe's data.

    By the paper's protocol. Classification: resize to 256/224 of the size, centre crop. Detection and
    segmentation: each whole image, resized as its recipe says.
    """
    from vmamba_cli._checks import require_path
    from vmamba_cli._extra import load

    try:
        sizes = [float(scale) for scale in scales.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--scales: expected numbers with commas between, got {scales!r}") from None
    require_path(what, "run, checkpoint or recipe")
    evaluation = load("vmamba.train.evaluation", "train")
    # The average first: if there is none, the command fails before it evaluates anything.
    kinds = ["ema", "raw"] if weights is Weights.both else [weights.value]
    folders: list[Path] = []
    if out is not None:
        folders = [out.expanduser() / kind if len(kinds) > 1 else out.expanduser() for kind in kinds]
    for folder in folders:
        evaluation.check_folder(folder)
    options = {"flip": flip, "scales": sizes, "keep_predictions": out is not None}
    evaluations = [evaluation.evaluate(what, overrides or [], weights=kind, **options) for kind in kinds]
    if not load("vmamba.train.trainer", "train").is_first_process():
        return
    for each, folder in zip(evaluations, folders, strict=False):  # without --out there are no folders
        evaluation.write_evaluation(each, folder)
    _show(evaluations, per_class, as_json)


def _show(evaluations: Sequence[Any], per_class: bool, as_json: bool) -> None:
    import json

    from vmamba.words import counted

    if as_json:
        values = [_plain(each, per_class) for each in evaluations]
        typer.echo(json.dumps(values if len(values) > 1 else values[0]))
        return
    for each in evaluations:
        left_out = f", {len(each.skipped)} left out" if each.skipped else ""
        typer.echo(f"{each.source}, {each.weights} weights, {counted(each.samples, 'sample')}{left_out}")
        for name, value in each.scores.items():
            typer.echo(f"{name} {value:.4f}")
        if per_class:
            _show_classes(each)


def _plain(evaluation: Any, per_class: bool) -> dict[str, Any]:
    """Plain values for JSON."""
    values = {
        "weights": evaluation.weights,
        "samples": evaluation.samples,
        "skipped": len(evaluation.skipped),
        **evaluation.scores,
    }
    if per_class:
        values["per_class"] = evaluation.class_table
    return values


def _show_classes(evaluation: Any) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = evaluation.class_table
    table = Table("class", box=None, pad_edge=False)
    for column in list(rows[0])[1:]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(Text(_shown(value)) for value in row.values()))
    Console().print(table)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
