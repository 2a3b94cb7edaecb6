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

    from vmamba.analysis.complexity import ModelError, count, create_on_meta
    from vmamba.models import ALIASES, model_names

    names = fnmatch.filter(model_names(), pattern)
    if not names:
        raise ModelError(f"no model matches {pattern!r}; `vmamba list` shows all")
    models = {variant: create_on_meta(variant) for variant in dict.fromkeys(ALIASES.get(n, n) for n in names)}
    counts = {variant: count(m, m.pretrained_cfg["input_size"]) for variant, m in models.items()}
    rows = []
    for name in names:
        variant = ALIASES.get(name, name)
        cfg = models[variant].pretrained_cfg
        rows.append(
            {
                "model": name,
                "same as": variant if name in ALIASES else "",
                "input": cfg["input_size"][-1],
                "parameters": counts[variant].parameters,
                "GMACs": round(counts[variant].macs / 1e9, 3),
                "weights": "authors'" if cfg.get("url") else "",
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for name, value in rows[0].items():
        table.add_column(name, no_wrap=True, justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in row.values()))
    Console().print(table)


def _text(value: str | int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if isinstance(value, float) else value
