"""`vmamba eval`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoints/best.ckpt or last.ckpt of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value, laid over the checkpoint's recipe.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Judge a checkpoint on the evaluation split of its recipe's data."""
    import json

    from vmamba_cli._extra import load

    scores = load("vmamba.train.run", "train").evaluate(checkpoint, overrides or [])
    if as_json:
        typer.echo(json.dumps(scores))
        return
    for name, value in scores.items():
        typer.echo(f"{name} {value:.4f}")
