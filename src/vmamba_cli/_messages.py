"""How the command reports wrong arguments, and what it does."""

import os
import sys
from typing import Any, NoReturn

import typer


def refuse(message: str) -> NoReturn:
    """Print one line to the standard error and end with exit status 2.

    For checks that run before the library is imported; the library itself raises `vmamba.errors.UserError`.
    """
    say(f"vmamba: {message}", error=True)
    raise typer.Exit(2)


def say(message: str, error: bool = False) -> None:
    """Print one line to the standard error, an error in red."""
    typer.secho(encodable(message, sys.stderr), fg=typer.colors.RED if error else None, err=True)


def encodable(text: str, stream: Any) -> str:
    """The text, with characters that the stream cannot encode and bytes that are not text escaped."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace") if not text.isascii() else text
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
