"""Entry point of the `vmamba` command."""

import importlib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

VERBS = ("train", "eval", "predict", "runs", "info", "list", "bench")


class _Verbs(TyperGroup):
    """Loads a verb's file only when that verb is called, and tells a user's errors."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"vmamba_cli.{cmd_name}")
        if hasattr(module, "app"):  # a verb with verbs of its own
            return typer.main.get_group(module.app)
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        app.command(cmd_name)(module.command)
        return typer.main.get_command(app)

    def invoke(self, ctx: Any) -> Any:
        """What the user can mend is one message and exit status 2, an interrupt 130."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # A `UserError` can only be here if its module is loaded already: nothing is imported for it.
            errors = sys.modules.get("vmamba.errors")
            if errors is None or not isinstance(error, errors.UserError) or ctx.params["debug"]:
                raise
            interrupted = type(error).__name__ == "Interrupted"
            if interrupted and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":
                raise typer.Exit(0) from error  # the first process speaks for all
            typer.secho(f"vmamba: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(130 if interrupted else 2) from error


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"vmamba {version('vmamba')}")
        raise typer.Exit


@app.callback()
def vmamba(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error arose; before the verb.")
    ] = False,
) -> None:
    """VMamba: the visual state-space backbone."""


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
