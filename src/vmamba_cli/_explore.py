"""What `vmamba explore` does once its arguments are checked. Imports PyTorch and the library: seconds."""

from collections.abc import Sequence

import typer

from vmamba.analysis.complexity import parse_size
from vmamba.explorer import Explorer, ExplorerServer, ShownModel
from vmamba.models.checkpoints import Weights
from vmamba_cli._analyses import Source, image_paths, short_names


def shown_models(
    sources: Sequence[str], untrained: bool, *, device: str, weights: Weights, seed: int, size: str | None
) -> list[ShownModel]:
    """The models of the page.

    Args:
        sources: As the user named them.
        untrained: Add the first one with new weights.
        device: As `vmamba.load` takes it.
        weights: Which of a checkpoint's weights.
        seed: Of new weights.
        size: Of the images, as the user gave it; None for each model's own.
    """
    shape = None if size is None else parse_size(size)
    models = []
    for name, text in zip(short_names(sources), sources, strict=True):
        source = Source(text, device, weights, seed)
        models.append(ShownModel(name, source.load(trained=True), shape))
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
