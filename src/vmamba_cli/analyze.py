"""`vmamba analyze`: what the paper's figures show, of any model.

The parameters of a command are its options, so there may be many.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from vmamba_cli._inputs import require_images
from vmamba_cli._messages import refuse

app = typer.Typer(
    name="analyze", no_args_is_help=True, rich_markup_mode="rich", help="Draw and count what a model does."
)


class Weights(str, Enum):
    auto = "auto"
    raw = "raw"
    ema = "ema"


Images = Annotated[
    list[str], typer.Argument(help="Images, folders with all images below them, or globs, 'photos/**/*.jpg'.")
]
WhichWeights = Annotated[
    Weights, typer.Option(help="As trained, their average, or the average where a checkpoint has one.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")]
Size = Annotated[
    str | None,
    typer.Option(
        "--input",
        help="Size of the images, 384 or 512x2048 (height x width); by default the model's.",
        show_default=False,
    ),
]
Untrained = Annotated[
    bool, typer.Option("--untrained", help="The architecture with new weights, without its training.")
]
Seed = Annotated[int, typer.Option(help="Of new weights, and of which images are taken.")]
Out = Annotated[Path, typer.Option(help="Folder for the pictures and numbers.")]


@app.command("erf")
def erf(
    images: Images,
    checkpoints: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            help="A run's folder, a checkpoint or a file of weights; may be given several times.",
            show_default=False,
        ),
    ] = [],  # noqa: B006  (typer reads it)
    models: Annotated[
        list[str],
        typer.Option(
            "--model",
            help="A model of timm's, with its pretrained weights; may be given several times.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    weights: WhichWeights = Weights.auto,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Only before training: no pretrained weights are needed.")
    ] = False,
    size: Size = None,
    sample: Annotated[int, typer.Option(min=1, help="Of more images, take so many at random.")] = 50,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("analysis"),
) -> None:
    """Effective receptive fields (Figure 10), before and after training, of models side by side."""
    require_images(images)
    if not checkpoints and not models:
        refuse("analyze erf: of what? Give --checkpoint RUN, or --model resnet50; each several times")
    from vmamba_cli import _results

    _results.check_folder(out, "erf.png", results="erf.json")
    from vmamba_cli import _analyses

    paths = _analyses.sampled(_analyses.image_paths(images), sample, seed)
    sources = [_analyses.Source(text, device, weights.value, seed) for text in [*checkpoints, *models]]
    fields = _analyses.receptive_fields(sources, paths, size, [False] if untrained else [False, True])
    _analyses.write_fields(fields, out, len(sources))
    _results.write(out, [row for field in fields for row in field.rows()], "erf.json")
    _wrote(out, "erf.png", "erf.csv", "erf.json", "erf.npz")


def _wrote(out: Path, *names: str) -> None:
    for name in names:
        typer.echo(str(out / name))
