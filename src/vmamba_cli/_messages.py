"""How the command reports wrong arguments."""

from typing import NoReturn

import typer


def refuse(message: str) -> NoReturn:
    """Print one line to the standard error and end with exit status 2.

    For checks that run before the library is imported; the library itself raises `vmamba.errors.UserError`.
    """
    typer.secho(f"vmamba: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2)
