"""`vmamba resume`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    run: Annotated[Path, typer.Argument(help="The run's folder, or a checkpoint in it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, laid over its recipe.", show_default=False)
    ] = None,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="Let what is learnt change too: schedule.*, optim.lr, augment.* and their like.",
        ),
    ] = False,
) -> None:
    """Go on with a run, from its newest whole checkpoint.

    How it runs may change: train.workers=2, data.root=ELSEWHERE. With --extend what it learns may too, also
    for a run that has finished: vmamba resume RUN schedule.epochs=400 --extend. The optimiser keeps its
    state, and history.jsonl in the run's folder says what changed at which step.
    """
    from vmamba_cli._checks import require_path
    from vmamba_cli._extra import load
    from vmamba_cli.train import show

    require_path(run, "run")
    training = load("vmamba.train.run", "train")
    show(training.resume(run, overrides or [], extend=extend))
