"""`vmamba runs`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="Where to look for runs.")] = Path("runs"),
    sort: Annotated[
        str,
        typer.Option(
            help="name, model, state, train_loss or val_loss, upwards; epochs, step, last, best, "
            "images_per_second or changed, downwards."
        ),
    ] = "name",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs below a folder side by side."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.measure import Measurement

    from vmamba_cli._extra import load

    runs = load("vmamba.train.runs", "train").find_runs(folder, sort)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in runs], indent=2))
        return
    good = [run for run in runs if not run.problem]
    if good:
        table = _table(good)
        # At the table's full width: a narrow terminal wraps lines, but nothing is cut off.
        width = Measurement.get(Console(), Console(width=10_000).options, table).maximum
        Console(width=width).print(table)
    elif not runs:
        typer.echo(f"no runs below {folder}")
    for run in runs:
        if run.problem:
            typer.echo(run.problem, err=True)


def _table(runs: Sequence[Any]) -> Any:
    """A row for each run that could be read."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in ("run", "model", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("epochs", "steps", "score", "last", "best", "at", "train loss", "val loss", "images/s"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("changed", no_wrap=True)
    for run in runs:
        in_epochs = run.unit == "epochs"
        table.add_row(
            Text(run.name),
            Text(run.model),
            run.state,
            f"{run.epochs}/{run.length}" if in_epochs else str(run.epochs),
            str(run.step) if in_epochs else f"{run.step}/{run.length}",
            run.score.removeprefix("val/"),
            _text(run.last, 4),
            _text(run.best, 4),
            str(run.best_epoch or ""),
            _text(run.train_loss, 3),
            _text(run.val_loss, 3),
            _text(run.images_per_second, 0),
            run.changed,
        )
    return table


def _text(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
