"""`vmamba list`: the table in models.json, which `tools/model_table.py` makes. PyTorch is not imported."""

from typing import Annotated

import typer


def command(
    pattern: Annotated[
        str, typer.Argument(help="Names to show: a word that is in them, or a pattern with * for anything.")
    ] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models, with their counts at their own input size."""
    import fnmatch
    import json
    from pathlib import Path

    from vmamba_cli._messages import refuse

    table = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))
    whole = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    rows = [row for row in table if fnmatch.fnmatchcase(row["model"], whole.lower())]
    if not rows:
        refuse(f"no model matches {pattern!r}; `vmamba list` shows all")
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    columns = [[title, *(_text(row[title]) for row in rows)] for title in rows[0]]
    for title, column in zip(rows[0], columns, strict=True):
        width = max(map(len, column))
        left = isinstance(rows[0][title], str)
        column[:] = [cell.ljust(width) if left else cell.rjust(width) for cell in column]
    for line in zip(*columns, strict=True):
        typer.echo("  ".join(line).rstrip())


def _text(value: str | int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else value
