"""Entry point of the `vmamba` command."""

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

VERBS = ("train", "eval", "predict", "info", "list")


class _Verbs(TyperGroup):
    """Loads a verb's file only when that verb is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        module = importlib.import_module(f"vmamba_cli.{cmd_name}")
        app.command(cmd_name)(module.command)
        return typer.main.get_command(app)


app = typer.Typer(cls=_Verbs, no_args_is_help=True, add_completion=False, rich_markup_mode="rich")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"vmamba {version('vmamba')}")
        raise typer.Exit


@app.callback()
def vmamba(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show it."),
) -> None:
    """VMamba: the visual state-space backbone."""


def main() -> None:
    """Run the command; what the user can mend is one message and exit status 2, an interrupt 130."""
    try:
        app()
    except Exception as error:
        # A name's `UserError` can only be here if the library is loaded already: nothing is imported for it.
        errors = sys.modules.get("vmamba.errors")
        if errors is None or not isinstance(error, errors.UserError):
            raise
        typer.secho(f"vmamba: {error}", fg=typer.colors.RED, err=True)
        sys.exit(130 if type(error).__name__ == "Interrupted" else 2)


if __name__ == "__main__":
    main()
