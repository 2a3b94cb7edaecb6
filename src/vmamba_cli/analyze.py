"""`vmamba analyze`: what the paper's figures show, of any model.

The parameters of a command are its options, so there may be many.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from vmamba_cli._checks import require_path
from vmamba_cli._extra import importing
from vmamba_cli._inputs import require_images
from vmamba_cli._messages import refuse
from vmamba_cli.predict import Weights

app = typer.Typer(
    name="analyze", no_args_is_help=True, rich_markup_mode="rich", help="Draw and count what a model does."
)


class Kind(str, Enum):
    """The factors of a map, as `vmamba.analysis.attention.KINDS` names them."""

    CB = "CB"
    CwBw = "CwBw"
    ww = "ww"


Images = Annotated[
    list[str], typer.Argument(help="Images, folders with all images below them, or globs, 'photos/**/*.jpg'.")
]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="A run's folder, a checkpoint or a file of weights.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="A model's name: its pretrained weights, or with --checkpoint the model or backbone that the "
        "file is of.",
        show_default=False,
    ),
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
Seed = Annotated[int, typer.Option(help="Of new weights.")]
Out = Annotated[Path, typer.Option(help="Folder for the pictures and numbers.")]


@app.command("erf")
def erf(
    images: Images,
    checkpoints: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            help="A run's folder, a checkpoint or a file of weights; MODEL=FILE for a file that does not say "
            "of which model it is; may be given several times.",
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
    seed: Annotated[int, typer.Option(help="Of new weights, and of which images are taken.")] = 0,
    device: Device = "auto",
    out: Out = Path("analysis"),
) -> None:
    """Effective receptive fields (Figure 10), before and after training, of models side by side."""
    require_images(images)
    if not checkpoints and not models:
        refuse("analyze erf: of what? Give --checkpoint RUN, or --model resnet50; each several times")
    places = [parse_place(text) for text in checkpoints]
    for path, _ in places:
        require_path(Path(path), "run or checkpoint")
    from vmamba_cli import _results

    _results.check_folder(out, "erf.png", results="erf.json")
    with importing():
        from vmamba.models.factory import check_name
        from vmamba_cli import _analyses

    for name in models:  # a mistyped one fails before the work on the others
        check_name(name)
    paths = _analyses.sampled(_analyses.image_paths(images), sample, seed)
    places += [(name, None) for name in models]
    sources = [_analyses.Source(text, device, weights.value, seed, of) for text, of in places]
    fields = _analyses.receptive_fields(sources, paths, size, [False] if untrained else [False, True])
    _analyses.write_fields(fields, out, len(sources))
    _results.write(out, [row for field in fields for row in field.rows()], "erf.json")
    _wrote(out, "erf.png", "erf.csv", "erf.json", "erf.npz")


@app.command("attention")
def attention(
    image: Annotated[str, typer.Argument(help="An image.")],
    checkpoint: Checkpoint = None,
    model: Model = None,
    weights: WhichWeights = Weights.auto,
    untrained: Untrained = False,
    query: Annotated[str, typer.Option(help="x,y of the query patch, over width and height.")] = "0.5,0.5",
    stage: Annotated[int, typer.Option(min=0, help="Of the block.")] = 2,
    block: Annotated[int, typer.Option(min=0, help="In its stage.")] = 1,
    module: Annotated[
        str | None,
        typer.Option(
            help="Name of the SS2D in the backbone, instead of stage and block.", show_default=False
        ),
    ] = None,
    size: Size = None,
    kinds: Annotated[
        list[Kind],
        typer.Option(
            "--kind", help="Q Kᵀ alone, with the decay, or the decay alone; may be given several times."
        ),
    ] = [Kind.CB, Kind.CwBw, Kind.ww],  # noqa: B006
    delta: Annotated[bool, typer.Option("--delta", help="Each kind with δ too.")] = False,
    maps: Annotated[
        bool, typer.Option(help="The full maps too, whose memory grows with the square of the positions.")
    ] = True,
    panels: Annotated[bool, typer.Option("--panels", help="Every panel as a picture by itself too.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    out: Out = Path("analysis"),
) -> None:
    """What a scan attends to (Figures 4 to 7): by default of the block that the paper shows."""
    require_images([image])
    point = _parse_query(query)
    source = _source(checkpoint, model, "attention")
    from vmamba_cli import _results

    _results.check_folder(out, "attention.png", results="attention.npz")
    with importing():
        from vmamba.analysis import attention_figure as figure
        from vmamba_cli import _analyses

    subject = _analyses.Source(source, device, weights.value, seed, model if checkpoint else None)
    view = _analyses.view_scan(subject, image, size, not untrained, stage, block, module)
    position = view.scan.position(point)
    names, deltas = [kind.value for kind in kinds], [False, True] if delta else [False]
    drawn = figure.panels(view.scan, position, names, deltas=deltas, maps=maps)
    for path in _analyses.write_attention(view, drawn, point, out, panels):
        typer.echo(str(path))


@app.command("routes")
def routes(
    checkpoint: Checkpoint = None,
    model: Annotated[
        str | None, typer.Option(help="A model's name; routes need no weights.", show_default=False)
    ] = None,
    named: Annotated[
        list[str],
        typer.Option(
            "--routes",
            help="cross, unidirectional, bidirectional, cascade, snake, diagonal, window:7, atrous:2, or "
            "routes with commas between, such as row,window_column:4; several times for several rows of the "
            "figure.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    order: Annotated[
        Path | None,
        typer.Option(
            help="A file of permutations of the positions 0, 1, …: lines of numbers, or .npy.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        str, typer.Option(help="Positions, 7 or 5x9 (height x width), of --routes and --order.")
    ] = "7",
    size: Size = None,
    image: Annotated[
        str | None, typer.Option(help="A picture behind the routes.", show_default=False)
    ] = None,
    out: Out = Path("analysis"),
) -> None:
    """In which order each route reads an image (Figures 2, 3 and 12)."""
    if checkpoint is None and model is None and not named and order is None:
        refuse(
            "analyze routes: which? Give --model vmamba_tiny, --checkpoint, --routes cross, or --order FILE"
        )
    require_images([image] if image is not None else [])
    if order is not None:
        require_path(order, "file of permutations")
    from vmamba_cli import _results

    _results.check_folder(out, "routes.png", results="routes.npz")
    with importing():
        from vmamba_cli import _analyses

    sets = _analyses.named_routes(named, order, grid)
    if checkpoint is not None or model is not None:
        source = _analyses.Source(
            _source(checkpoint, model, "routes"), "cpu", "auto", 0, model if checkpoint else None
        )
        sets |= _analyses.model_routes(source, size)
    for path in _analyses.write_routes(sets, image, out):
        typer.echo(str(path))


@app.command("complexity")
def complexity(
    model: Annotated[str, typer.Argument(help="A model of `vmamba list`, or any of timm's.")],
    size: Size = None,
    depth: Annotated[int, typer.Option(min=0, help="Levels of modules below the model.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Parameters, multiply-adds, activations and memory of each module, for one image.

    Multiply-adds by the paper's counting (9·l·d·n a route of a scan), by the for-loop's (3.5·l·d·n), and by
    PyTorch's, which leaves out norms and pooling. Memory is of the image and intermediate results, in
    inference.
    """
    with importing():
        from vmamba_cli import _analyses

    rows = _analyses.complexity_rows(model, size, depth)
    _analyses.print_complexity(rows, as_json)


def parse_place(text: str) -> tuple[str, str | None]:
    """A checkpoint's path, and the model that it is of where the user says it: "FILE" or "MODEL=FILE"."""
    model, separator, path = text.partition("=")
    if not separator or Path(text).expanduser().exists():
        return text, None
    return path, model


def _parse_query(text: str) -> tuple[float, float]:
    """Parse "0.5,0.25"."""
    try:
        x, y = (float(value) for value in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--query: expected x,y such as 0.5,0.25, got {text!r}") from None
    return x, y


def _source(checkpoint: str | None, model: str | None, verb: str) -> str:
    """What `vmamba.load` loads."""
    if checkpoint is not None:
        return checkpoint
    if model is None:
        refuse(f"analyze {verb}: of what? Give --checkpoint RUN, or --model vmamba_tiny")
    return model


def _wrote(out: Path, *names: str) -> None:
    for name in names:
        typer.echo(str(out / name))
