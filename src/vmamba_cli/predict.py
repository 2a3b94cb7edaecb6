"""`vmamba predict`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Weights(str, Enum):
    auto = "auto"
    raw = "raw"
    ema = "ema"


def command(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    checkpoint: Annotated[Path, typer.Option(help="A run's folder (its best.ckpt), or a checkpoint.")],
    weights: Annotated[
        Weights,
        typer.Option(help="As trained, their average, or the average where a run's checkpoint has one."),
    ] = Weights.auto,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every class.")] = False,
) -> None:
    """Say what images show."""
    import json
    from dataclasses import asdict

    from vmamba.data import read_image
    from vmamba_cli._extra import load

    decoded = [read_image(path) for path in images]
    predict = (
        load("vmamba.train.session", "train").open_session(checkpoint, weights=weights.value).predictor()
    )
    predictions = [prediction for image in decoded for prediction in predict([image])]
    if as_json:
        found = [
            {"image": str(image), **asdict(prediction)}
            for image, prediction in zip(images, predictions, strict=True)
        ]
        typer.echo(json.dumps(found, indent=2))
        return
    for image, prediction in zip(images, predictions, strict=True):
        typer.echo(f"{image}: {prediction.text(top)}")
