"""`vmamba prove`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vmamba_cli._extra import importing
from vmamba_cli._messages import refuse


def command(
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:1, xpu …; default the machine's accelerator.")
    ] = None,
    backend: Annotated[str, typer.Option(help="The backend of the selective scan.")] = "triton",
    thorough: Annotated[bool, typer.Option("--all", help="More shapes and all types: minutes.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="A JSON file for the report, to attach to an issue.")
    ] = None,
) -> None:
    """Prove a backend on this machine's GPU: is it right, and faster than plain PyTorch?

    The verdict replaces the one that is kept; `vmamba info` shows it. Exit status 1 if the proof fails.
    """
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        refuse(f"--out {out}: expected a file in a folder that exists")

    import json
    from dataclasses import asdict

    with importing():
        from vmamba.environment import environment
        from vmamba.files import write_atomically
        from vmamba.ops import prove_backend

    proof = prove_backend(backend, device, thorough=thorough)
    verdict = proof.verdict
    typer.echo(describe(asdict(verdict)))
    for failure in proof.failures[1:]:
        typer.echo(f"  also: {failure}")
    for what, ratio in verdict.speedups.items():
        typer.echo(f"  {ratio:.2f} times as fast as 'chunked': {what}")
    if out is not None:
        report = {"environment": environment(), **asdict(proof)}
        write_atomically(out, json.dumps(report, indent=1) + "\n")
        typer.echo(str(out))
    if not verdict.is_proven:
        raise typer.Exit(1)


def describe(verdict: dict[str, Any]) -> str:
    """A verdict in one line."""
    where = f"{verdict['backend']} on {verdict['machine']['device']}"
    found = "right and faster" if verdict["reason"] is None else f"not used: {verdict['reason']}"
    how = f"{verdict['checked']} calls checked in {verdict['seconds']:.0f} s, {verdict['date']}"
    return f"{where}: {found} ({how})"
