"""`vmamba report`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder that `vmamba eval --out` wrote, if it is neither in a run nor beside one.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """Show what runs learnt and how they were judged, on one page in a file of its own."""
    from vmamba_cli._checks import require_path
    from vmamba_cli._extra import load
    from vmamba_cli._messages import refuse

    out = out.expanduser()
    if out.suffix.lower() not in (".html", ".htm"):
        refuse(f"--out {out}: expected a name that ends in .html")
    if out.is_dir():
        refuse(f"--out {out}: a folder; expected a file to write")
    for run in runs:
        require_path(run, "run")
    report = load("vmamba.report", "train")
    records = report.read_records(runs, evaluation or [])
    report.write_report(records, out)
    typer.echo(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)")
