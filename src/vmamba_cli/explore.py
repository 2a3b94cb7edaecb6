"""`vmamba explore`."""

from pathlib import Path
from typing import Annotated

import typer

from vmamba_cli._extra import importing
from vmamba_cli.analyze import Device, Seed, Size, Weights, WhichWeights, parse_place


def command(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Images, folders with all images below them, or globs; others can be dropped onto the page.",
            show_default=False,
        ),
    ] = None,
    checkpoints: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            help="A run's folder, a checkpoint or a file of weights; MODEL=FILE for a file that does not say "
            "of which model it is; twice to compare.",
            show_default=False,
        ),
    ] = [],  # noqa: B006  (typer reads it)
    models: Annotated[
        list[str],
        typer.Option("--model", help="A model's name, with its pretrained weights.", show_default=False),
    ] = [],  # noqa: B006
    weights: WhichWeights = Weights.auto,
    untrained: Annotated[
        bool,
        typer.Option("--untrained", help="Beside one model the same with new weights, without its training."),
    ] = False,
    size: Size = None,
    seed: Seed = 0,
    device: Device = "auto",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0 for any that is free.")] = 8642,
) -> None:
    """Look inside a model on a page in the browser: where each patch of an image receives from.

    Only this machine can open the page, and nothing is asked from elsewhere. Ctrl-C ends it.
    """
    from vmamba_cli._checks import require_path
    from vmamba_cli._inputs import require_images
    from vmamba_cli._messages import refuse

    require_images(images or [])
    number = len(checkpoints) + len(models) + untrained
    if number == untrained:
        refuse(
            "explore: what? Give --checkpoint RUN, or --model vmamba_pico_wide; its weights come with vmamba"
        )
    if number > 2:
        refuse(f"explore: at most two models side by side, got {number}")
    places = [parse_place(text) for text in checkpoints]
    for path, _ in places:
        require_path(Path(path), "run or checkpoint")
    with importing():
        from vmamba.models.factory import check_name
        from vmamba_cli import _explore
        from vmamba_cli._analyses import Source

    for name in models:
        check_name(name)
    places += [(name, None) for name in models]
    sources = [Source(text, device, weights.value, seed, of) for text, of in places]
    _explore.serve(_explore.shown_models(sources, untrained, size), images or [], port)
