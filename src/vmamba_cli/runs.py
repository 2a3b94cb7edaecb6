"""`vmamba runs`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    folder: Annotated[Path, typer.Argument(help="Where to look for runs.")] = Path("runs"),
    sort: Annotated[
        str,
        typer.Option(
            help="name, model, epochs, last, best, train_loss, images_per_second or changed; "
            "numbers and dates from above."
        ),
    ] = "name",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs below a folder side by side."""
    import json
    import sys
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from vmamba_cli._extra import load

    runs = load("vmamba.train.runs", "train").find_runs(folder, sort)
    if as_json:
        typer.echo(json.dumps([asdict(run) for run in runs], indent=2))
        return
    good = [run for run in runs if not run.problem]
    table = Table(box=None, pad_edge=False)
    for column in ("run", "model"):
        table.add_column(column, no_wrap=True)
    for column in ("epochs", "score", "last", "best", "at", "loss", "images/s", "changed"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in good:
        table.add_row(
            *(run.name, run.model, f"{run.epochs}/{run.of}", run.score.removeprefix("val/")),
            *(_text(run.last, 4), _text(run.best, 4), str(run.best_epoch or "")),
            *(_text(run.train_loss, 3), _text(run.images_per_second, 0), run.changed),
        )
    if good:
        Console(width=None if sys.stdout.isatty() else 200).print(table)  # rich takes 80 for a file
    elif not runs:
        typer.echo(f"no runs below {folder}")
    for run in runs:
        if run.problem:
            typer.echo(run.problem, err=True)


def _text(value: Any, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
