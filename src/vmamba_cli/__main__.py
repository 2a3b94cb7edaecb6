"""Entry point of the `vmamba` command."""

import difflib
import importlib
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vmamba_cli._starter import ends_with_its_starter

VERBS = (
    "train",
    "resume",
    "eval",
    "predict",
    "runs",
    "report",
    "info",
    "prove",
    "list",
    "analyze",
    "explore",
    "bench",
    "study",
    "export",
)


class _Verbs(TyperGroup):
    """Loads a verb's file only when that verb is called, and prints the errors that a user can fix."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"vmamba_cli.{cmd_name}")
        if hasattr(module, "app"):  # a verb with subcommands
            return typer.main.get_group(module.app)
        app = typer.Typer(add_completion=False, rich_markup_mode="rich")
        app.command(cmd_name)(module.command)
        return typer.main.get_command(app)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that is called; for a mistyped one the message suggests similar verbs."""
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            close = difflib.get_close_matches(args[0], VERBS, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(VERBS)}"
            ctx.fail(f"no verb {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """An error that the user can fix is one message and exit status 2, an interrupt status 130."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":
                _refuse_setting(error)
            if ctx.params["debug"] or not _is_the_users(error):
                raise
            interrupted = type(error).__name__ == "Interrupted"
            if interrupted and os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":
                raise typer.Exit(0) from error  # only the first process prints the message
            _say(_message(error))
            raise typer.Exit(130 if interrupted else 2) from error


_KEYS = {
    "--epochs": "schedule.epochs",
    "--steps": "schedule.steps",
    "--lr": "optim.lr",
    "--learning-rate": "optim.lr",
    "--batch-size": "train.batch_size",
    "--workers": "train.workers",
    "--devices": "train.devices",
    "--seed": "train.seed",
    "--model": "model.name",
    "--weights": "model.weights",
    "--data": "data.root",
    "--image-size": "data.image_size",
}
"""Settings of a recipe, by the options that other programs have for them."""


def _refuse_setting(error: Any) -> None:
    """Stop with the key of the recipe that an unknown option probably means, if there is one."""
    key = _KEYS.get(error.option_name)
    if key is not None and error.ctx is not None and error.ctx.info_name in ("train", "resume", "eval"):
        _say(
            f"{error.ctx.info_name}: no option {error.option_name}; settings of the recipe go without dashes "
            f"behind it: {key}=…"
        )
        raise typer.Exit(2) from error


def _is_the_users(error: Exception) -> bool:
    """Whether an error's message alone is enough: a `UserError`, or an error of the file system."""
    # If the error is a `UserError`, its module is loaded already: no import is needed.
    errors = sys.modules.get("vmamba.errors")
    if errors is not None and isinstance(error, errors.UserError):
        return True
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, BrokenPipeError)


def _message(error: Exception) -> str:
    if type(error).__module__.startswith("vmamba") or not isinstance(error, OSError):
        return str(error)
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    _discard_output()  # otherwise Python tries again when it exits
    return f"the output cannot be written: {error.strerror}"


def _discard_output() -> None:
    """Discard buffered and further output."""
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
        if isinstance(stream, io.TextIOWrapper):  # a name may have characters the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        with ends_with_its_starter():
            app()
    finally:
        _flush()


def _flush() -> None:
    """Fail if the output could not be written, as on a full disk: Python itself would only warn."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        _discard_output()
    except OSError as error:
        _discard_output()
        _say(f"the output cannot be written: {error.strerror}")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
