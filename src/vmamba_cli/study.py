"""`vmamba study`: the paper's studies, measured here.

The parameters of a command are its options, so there may be many.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from vmamba_cli._checks import prepare_device, require_recipe
from vmamba_cli._messages import refuse

app = typer.Typer(
    name="study",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure what the paper's studies measure, and write tables and figures.",
)

Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="Only this model, of the table or of timm; may be given several times."),
]
Batch = Annotated[int, typer.Option(min=1, help="Images at once.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often all subjects run in turns.")]
Training = Annotated[bool, typer.Option("--train/--no-train", help="Time training steps too.")]
Memory = Annotated[bool, typer.Option("--memory/--no-memory", help="Measure peak memory too.")]
Autocast = Annotated[str | None, typer.Option(help="Of training: bf16 or fp16; default float32.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default PyTorch's own.")]
Minutes = Annotated[
    float | None,
    typer.Option(min=0, help="Begin nothing that will not end within this time.", show_default=False),
]
Accuracy = Annotated[
    list[str] | None,
    typer.Option(
        help="MODEL=WHAT: judge weights of that model at each of its sizes; WHAT is a run, a checkpoint of a "
        "run, or a recipe with model.weights. May be given several times.",
        show_default=False,
    ),
]
Out = Annotated[
    Path, typer.Option(help="Folder for the results; what it holds already is not measured again.")
]


@app.command("throughput")
def throughput(
    models: Models = None,
    batch: Batch = 8,
    rounds: Rounds = 5,
    train: Training = True,
    memory: Memory = True,
    autocast: Autocast = None,
    device: Device = "cpu",
    threads: Threads = None,
    minutes: Minutes = None,
    accuracy: Accuracy = None,
    out: Out = Path("study"),
) -> None:
    """Every row of Table 1: parameters, multiply-adds, speed and memory."""
    conditions = (batch, rounds, train, memory, autocast, device, accuracy)
    _run([_maker("throughput", models=models or ())], conditions, threads, minutes, out)


@app.command("resolution")
def resolution(
    models: Models = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--input", min=1, help="Side of the images; may be given several times. Default: Table 4's."
        ),
    ] = None,
    batch: Batch = 1,
    rounds: Rounds = 5,
    train: Training = False,
    memory: Memory = True,
    autocast: Autocast = None,
    device: Device = "cpu",
    threads: Threads = None,
    minutes: Minutes = None,
    accuracy: Accuracy = None,
    out: Out = Path("study"),
) -> None:
    """Table 4 and Figure 11: how cost grows with the image, and with which exponent."""
    conditions = (batch, rounds, train, memory, autocast, device, accuracy)
    chosen: dict[str, Any] = {"models": models or ()} | ({"sizes": sizes} if sizes else {})
    _run([_maker("resolution", **chosen)], conditions, threads, minutes, out)


@app.command("ladder")
def ladder(
    batch: Batch = 8,
    rounds: Rounds = 5,
    train: Training = True,
    memory: Memory = True,
    autocast: Autocast = None,
    device: Device = "cpu",
    threads: Threads = None,
    minutes: Minutes = None,
    accuracy: Accuracy = None,
    out: Out = Path("study"),
) -> None:
    """Figure 9: the steps from the first VMamba to the fast one."""
    conditions = (batch, rounds, train, memory, autocast, device, accuracy)
    _run([_maker("ladder")], conditions, threads, minutes, out)


@app.command("patterns")
def patterns(
    model: Annotated[
        str | None,
        typer.Option(
            help="That reads images along the patterns. Default: the recipe's, or vmamba_tiny.",
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option("--input", min=1, help="Side of the images. Default: the recipe's, or the model's."),
    ] = None,
    routes: Annotated[
        list[str] | None,
        typer.Option(help="A pattern; may be given several times. Default: Table 5's and others."),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Also train every pattern by this recipe, and compare accuracies.", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, laid over the recipe.", show_default=False),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Trainings of each pattern. Default: 3.")] = None,
    batch: Batch = 8,
    rounds: Rounds = 5,
    train: Training = True,
    memory: Memory = True,
    autocast: Autocast = None,
    device: Device = "cpu",
    threads: Threads = None,
    minutes: Minutes = None,
    out: Out = Path("study"),
) -> None:
    """Table 5 and Figure 12: the same network reading images along other routes."""
    from vmamba_cli._extra import load

    args: dict[str, Any] = {}
    if recipe is None:
        if overrides or seeds:
            refuse("--set and --seeds are of a training: name its recipe by --recipe")
    else:  # found wrong before the speeds are measured, which takes long
        recipe = require_recipe(recipe)
        read = load("vmamba.train.session", "train").load_recipe(recipe, overrides or [])
        load("vmamba.studies.training", "train").one_process(read)
        if model not in (None, read.model.name):
            refuse(f"--model {model}: the recipe trains {read.model.name}; leave one of the two out")
        model, args = read.model.name, read.model.args
        side = getattr(read.data, "image_size", None)
        size = size or (side if isinstance(side, int) else None)
    names = list(dict.fromkeys(routes or ()))
    chosen = {"model": model or "vmamba_tiny", "size": size, "routes": names, "args": args}
    conditions = (batch, rounds, train, memory, autocast, device, None)
    budget = _run([_maker("patterns", **chosen)], conditions, threads, minutes, out)
    if recipe is not None:
        studies, training = load("vmamba.studies", "train"), load("vmamba.studies.training", "train")
        out = out.expanduser()
        patterns = names or list(studies.PATTERNS)
        with _told_how_to_go_on(out):
            outcomes = training.train_patterns(
                recipe, patterns, seeds or 3, out / "patterns", overrides or [], budget, log=typer.echo
            )
        typer.echo(training.table(outcomes))
        typer.echo(f"{studies.write_report(out, studies.STUDIES)}")


@app.command("all")
def all_studies(
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images at once; default 8, and 1 for the resolutions.", show_default=False),
    ] = None,
    rounds: Rounds = 5,
    train: Training = True,
    memory: Memory = True,
    autocast: Autocast = None,
    device: Device = "cpu",
    threads: Threads = None,
    minutes: Minutes = None,
    accuracy: Accuracy = None,
    out: Out = Path("study"),
) -> None:
    """All studies within a time, and one report; called again, it goes on."""
    conditions = (batch, rounds, train, memory, autocast, device, accuracy)
    names = ("ladder", "patterns", "throughput", "resolution")
    _run([_maker(name) for name in names], conditions, threads, minutes, out)


def _maker(name: str, **chosen: Any) -> Callable[[Any], Any]:
    """A function that makes a study from `vmamba.studies.STUDIES`, which is imported later."""
    return lambda studies: studies[name](**chosen)


def _run(
    makers: Sequence[Callable[[Any], Any]],
    conditions: tuple[Any, ...],
    threads: int | None,
    minutes: float | None,
    out: Path,
) -> Any:
    """Run studies and print their tables; returns the budget, with what is left of it."""
    from vmamba_cli import _results
    from vmamba_cli._extra import load

    batch, rounds, train, memory, autocast, device, accuracy = conditions
    if autocast not in (None, "bf16", "fp16"):
        raise typer.BadParameter(f"--autocast: expected bf16 or fp16, got {autocast!r}")
    judged = {}
    for text in accuracy or ():
        model, _, what = text.partition("=")
        if not (model and what):
            refuse(f"--accuracy {text}: expected MODEL=WHAT, such as vmamba_tiny=runs/imagenet")
        judged[model] = what
    out = out.expanduser()
    _results.check_folder(out, "report.md")

    from rich.console import Console

    prepare_device(device, threads)
    studies = load("vmamba.studies", "train")
    console = Console()
    budget = studies.Budget(None if minutes is None else 60 * minutes)
    wanted = [make(studies.STUDIES) for make in makers]
    models = {subject.model for study in wanted for subject in study.subjects}
    if unknown := sorted(judged.keys() - models):
        refuse(f"--accuracy {unknown[0]}: not a model of this study, which has {', '.join(sorted(models))}")
    for study in wanted:
        images = batch or (1 if study.name == "resolution" else 8)
        how = studies.Conditions(device, images, rounds, autocast, train, memory, judged)
        with console.status(study.title) as status, _told_how_to_go_on(out):
            rows = studies.run_study(study, out / study.name, how, budget, status.update)
        _print_table(console, study.title, studies.cells(rows), out / study.name / "table.md")
        notes = [f"{row.subject.key}, {note}" for row in rows for note in row.notes]
        for line in [*notes, *studies.remarks(study, rows)]:
            console.print(line)
    report = studies.write_report(out, studies.STUDIES)
    typer.echo(f"{report}, and a folder with tables and a figure for each study")
    return budget


@contextmanager
def _told_how_to_go_on(out: Path) -> Iterator[None]:
    """Say on Ctrl-C that nothing that was finished is lost."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped; {out} holds what is finished, and the same command goes on", err=True)
        raise


NARROWER = ("quoted", "peak MB", "relative", "size", "GMACs", "parameters")
"""Columns that a narrow terminal leaves out, by a word of their titles; the first go first."""


def _print_table(console: Any, title: str, cells: Sequence[Sequence[str]], file: Path) -> None:
    """Print as many of a table's columns as fit into a terminal, and where the others are."""
    from rich.table import Table

    columns, widths = _fitting(cells, console.width if console.is_terminal else None)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(column[0], justify="right" if number else "left", width=width)
    for row in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*row)
    console.width = max(console.width, _width(widths))  # rich would cut values otherwise
    console.print(table)
    if len(columns) < len(_fitting(cells, None)[0]):
        console.print(f"More columns: {file}")


def _fitting(cells: Sequence[Sequence[str]], width: int | None) -> tuple[list[tuple[str, ...]], list[int]]:
    """The columns of a table that have values and fit into a width (None: any), and the width of each."""
    left_out: set[str] = set()
    for word in ("", *NARROWER):
        if word:
            left_out |= {title for title in cells[0] if word in title}
        columns, is_known = [], True
        for column in zip(*cells, strict=True):
            # What the paper states stands beside what was measured, or not at all.
            is_known = any(column[1:]) and (is_known or column[0] != "quoted")
            if is_known and column[0] not in left_out:
                columns.append(column)
        # A title may be broken between words, a value may not.
        widths = [max(map(len, (*column[0].split(), *column[1:], ""))) for column in columns]
        if width is None or _width(widths) <= width:
            break
    return columns, widths


def _width(widths: Sequence[int]) -> int:
    """Of a table's columns, with the space between them."""
    return sum(widths) + 2 * len(widths)
