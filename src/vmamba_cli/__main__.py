"""Entry point of the `vmamba` command."""

import difflib
import importlib
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

VERBS = ("train", "resume", "eval", "predict", "runs", "info", "list", "bench")


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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that is called; a mistyped one is answered with those near to it."""
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            close = difflib.get_close_matches(args[0], VERBS, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(VERBS)}"
            ctx.fail(f"no verb {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """What the user can mend is one message and exit status 2, an interrupt 130."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if ctx.params["debug"] or not _is_the_users(error):
                raise
            interrupted = type(error).__name__ == "Interrupted"
            if interrupted and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":
                raise typer.Exit(0) from error  # the first process speaks for all
            _say(_message(error))
            raise typer.Exit(130 if interrupted else 2) from error


def _is_the_users(error: Exception) -> bool:
    """Whether an error's message alone says what to do: ours for users, and those of files."""
    # A `UserError` can only be here if its module is loaded already: nothing is imported for it.
    errors = sys.modules.get("vmamba.errors")
    if errors is not None and isinstance(error, errors.UserError):
        return True
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError)


def _message(error: Exception) -> str:
    if type(error).__module__.startswith("vmamba") or not isinstance(error, OSError):
        return str(error)
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    _discard_output()  # else Python tries again at its end
    return f"the output cannot be written: {error.strerror}"


def _discard_output() -> None:
    """Have what is still to be printed go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(message: str) -> None:
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    text = message.encode(encoding, "backslashreplace").decode(encoding)
    typer.secho(f"vmamba: {text}", fg=typer.colors.RED, err=True)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name of a file may hold what a terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    finally:
        _flush()


def _flush() -> None:
    """Say if what was printed could not be written, as on a full disk: Python itself would only warn."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has read enough
        _discard_output()
    except OSError as error:
        _discard_output()
        _say(f"the output cannot be written: {error.strerror}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
