"""`vmamba list`."""

from typing import Annotated

import typer


def command(
    pattern: Annotated[str, typer.Argument(help="Names to show, with * for anything.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models, with their counts at their own input size."""
    import fnmatch
    import json

    from rich.console import Console
    from rich.table import Table

    from vmamba.analysis.complexity import count, create_on_meta
    from vmamba.models import ALIASES, VARIANTS

    names = fnmatch.filter([*ALIASES, *VARIANTS], pattern)
    if not names:
        typer.secho(f"vmamba: no model matches {pattern!r}", fg="red", err=True)
        raise typer.Exit(2)
    rows = []
    for name in names:
        model = create_on_meta(name)
        counts = count(model, model.pretrained_cfg["input_size"])
        rows.append(
            {
                "model": name,
                "alias of": ALIASES.get(name, ""),
                "input": model.pretrained_cfg["input_size"][-1],
                "parameters": counts.parameters,
                "GMACs": round(counts.macs / 1e9, 3),
                "weights": "authors'" if model.pretrained_cfg.get("url") else "",
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table()
    for column in rows[0]:
        table.add_column(column, no_wrap=column == "model")
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    Console().print(table)
