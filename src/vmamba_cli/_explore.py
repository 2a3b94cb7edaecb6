"""What `vmamba explore` does once its arguments are checked. Imports PyTorch and the library: seconds."""

from collections.abc import Sequence
from pathlib import Path

import typer

from vmamba.analysis.complexity import parse_size
from vmamba.errors import CheckpointError
from vmamba.explorer import Explorer, ExplorerServer, ShownModel
from vmamba_cli._analyses import Source, image_paths, short_names
from vmamba_cli._messages import say


def shown_models(sources: Sequence[Source], untrained: bool, size: str | None) -> list[ShownModel]:
    """The models of the page.

    Args:
        sources: As the user named them.
        untrained: Add each with new weights; a name without pretrained weights is shown so alone.
        size: Of the images, as the user gave it; None for each model's own.
    """
    shape = None if size is None else parse_size(size)
    models = []
    for name, source in zip(short_names([each.text for each in sources]), sources, strict=True):
        try:
            models.append(ShownModel(name, source.load(trained=True), shape))
        except CheckpointError as error:
            if not untrained or Path(source.text).expanduser().exists():
                raise
            say(str(error))
        if untrained:
            models.append(ShownModel(f"{name}, untrained", source.load(trained=False), shape))
    return models


def serve(models: Sequence[ShownModel], images: Sequence[str], port: int) -> None:
    """Serve the page until Ctrl-C.

    Args:
        models: To show.
        images: Files, folders and globs.
        port: Of the page.
    """
    explorer = Explorer(models, image_paths(images) if images else [])
    with ExplorerServer(explorer, port) as server:
        typer.echo(f"{server.address} (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("")
        finally:
            explorer.close()
