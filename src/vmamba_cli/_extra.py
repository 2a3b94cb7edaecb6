"""Modules that come with an extra."""

import importlib
from typing import Any

import typer


def load(module: str, extra: str) -> Any:
    """Import a module of the library that needs an extra's packages; if they are missing, say so and stop."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("vmamba"):
            raise
        typer.secho(f"vmamba: {error}; to get it: pip install 'vmamba[{extra}]'", fg="red", err=True)
        raise typer.Exit(2) from error
