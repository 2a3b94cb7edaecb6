"""`vmamba bench`.

The parameters of a command are its options, so there may be many.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vmamba_cli._checks import prepare_device
from vmamba_cli._extra import importing, load

app = typer.Typer(
    name="bench", no_args_is_help=True, rich_markup_mode="rich", help="Measure speed and memory side by side."
)

Sizes = Annotated[
    list[int], typer.Option("--input", min=1, help="Side of the images; may be given several times.")
]
Batches = Annotated[
    list[int], typer.Option("--batch", min=1, help="Images at once; may be given several times.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]
Rounds = Annotated[int, typer.Option(min=1, help="How often all run in turns.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default PyTorch's own.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results.json and the plot.")]

THROUGHPUT_PLOT = "throughput.png"


@app.command("models")
def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Models of timm; ratios are to the first. Default: vmamba_tiny and its peers."),
    ] = None,
    size: Sizes = [224],  # noqa: B006  (typer reads it)
    batch: Batches = [8],  # noqa: B006
    train: Annotated[bool, typer.Option("--train", help="A training step: forward and backward.")] = False,
    autocast: Annotated[str | None, typer.Option(help="bf16 or fp16; default float32.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Measure the peak memory of a call too.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="Of the selective scan; default the device's backend of choice.")
    ] = None,
    device: Device = "cpu",
    rounds: Rounds = 10,
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Throughput of models, in turns in one process, after a check of what they compute."""
    from vmamba_cli import _results

    if autocast not in (None, "bf16", "fp16"):
        raise typer.BadParameter(f"--autocast: expected bf16 or fp16, got {autocast!r}")
    if out is not None:
        _results.check_folder(out, THROUGHPUT_PLOT)

    from rich.console import Console

    with importing():
        from vmamba.bench import models as bench

    prepare_device(device, threads)
    names = names or ["vmamba_tiny", *bench.PEERS]
    rows: list[dict[str, Any]] = []
    console = Console()
    for pixels in size:
        for images in batch:
            setting = bench.Setting(pixels, images, train, autocast, device, backend)
            with console.status("…") as status:
                measurements = bench.bench_models(names, setting, rounds, memory, status.update)
            console.print(_models_table(measurements, setting, memory))
            rows += bench.to_rows(measurements, setting)
    if out is not None:
        path = _results.write(out, rows)
        bench.draw(rows, out / THROUGHPUT_PLOT)
        console.print(f"{path} and {out / THROUGHPUT_PLOT}")


def _models_table(measurements: Sequence[Any], setting: Any, memory: bool) -> Any:
    """A `rich` table of `vmamba.bench.models.Measurement`s at one setting."""
    import torch

    mode = "training step" if setting.train else "inference"
    mode += f", {setting.autocast} autocast" if setting.autocast else ""
    mode += f", backend {setting.backend}" if setting.backend else ""
    threads = torch.get_num_threads()
    where = f"{setting.device}, {threads} thread{'s' if threads > 1 else ''}"
    table = _table(f"{mode}, {setting.size}², batch {setting.batch}, {where}")
    table.add_column("model", no_wrap=True)
    for column in ("images/s", f"{measurements[0].model} is", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    if memory:
        table.add_column("peak MB", justify="right", no_wrap=True)
    for m in measurements:
        cells = [m.model, f"{m.images_per_second:.2f}", f"{m.ratio.median:.2f} ×"]
        cells.append(f"{m.ratio.low:.2f}–{m.ratio.high:.2f}")
        if memory:
            cells.append("–" if m.peak_memory is None else f"{m.peak_memory / 2**20:,.0f}")
        table.add_row(*cells)
    return table


@app.command("ops")
def ops(
    model: Annotated[str, typer.Argument(help="The model whose scans are measured.")] = "vmamba_tiny",
    size: Annotated[int, typer.Option("--input", min=1, help="Side of the images.")] = 224,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at once.")] = 8,
    backend: Annotated[
        str | None, typer.Option(help="The only one to measure; default all that are fast here.")
    ] = None,
    device: Device = "cpu",
    rounds: Rounds = 10,
    threads: Threads = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json.")] = None,
) -> None:
    """Speed of the scan's backends, of mambapy where it is installed, and of the exponentials alone."""
    from vmamba_cli import _results

    if out is not None:
        _results.check_folder(out)

    from dataclasses import asdict

    from rich.console import Console

    with importing():
        from vmamba.bench import operator as bench

    prepare_device(device, threads)
    console = Console()
    shapes = bench.shapes(model, size)
    rows = []
    for backward in (False, True):
        measurements = []
        for shape in shapes:
            with console.status(_shape(shape)):
                measurements += bench.bench_operator(
                    shape, batch, backward=backward, device=device, rounds=rounds, backend=backend
                )
        title = f"{model}'s scans, {size}², batch {batch}, forward" + (" and backward" if backward else "")
        console.print(_ops_table(title, measurements, bench.model_totals(measurements)))
        rows += [asdict(m) for m in measurements]
    console.print("A value is one (position, channel, route).")
    if out is not None:
        console.print(str(_results.write(out, rows)))


def _shape(shape: Any) -> str:
    lines = f"{shape.lines} × " if shape.lines > 1 else ""
    return f"{lines}{shape.height}×{shape.width}×{shape.channels}, N {shape.n_state}, R {shape.rank}"


def _ops_table(title: str, measurements: Sequence[Any], totals: dict[tuple[str, bool], float]) -> Any:
    """A `rich` table of `vmamba.bench.operator.ScanMeasurement`s, and seconds of all scans of an image."""
    table = _table(title)
    for column in ("shape", "backend"):
        table.add_column(column, no_wrap=True)
    for column in ("ns a value", "first is", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    for m in measurements:
        quartiles = f"{m.ratio.low:.2f}–{m.ratio.high:.2f}"
        speed = f"{m.nanoseconds:.3f}"
        table.add_row(_shape(m.shape), m.backend, speed, f"{m.ratio.median:.2f} ×", quartiles)
    for (backend, _), seconds in totals.items():
        table.add_row("all of an image", backend, f"{seconds * 1e3:.2f} ms", "", "")
    return table


@app.command("data")
def data(
    recipe: Annotated[Path, typer.Argument(help="A recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, laid over the recipe.", show_default=False)
    ] = None,
    workers: Annotated[
        str | None, typer.Option(help="Numbers of workers, such as 0,2,4; default those of the recipe.")
    ] = None,
    batches: Annotated[int, typer.Option(min=5, help="Batches to time.")] = 20,
    model: Annotated[bool, typer.Option(help="Measure the model's training step too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json.")] = None,
) -> None:
    """Speed of a recipe's data, and whether they or the model hold training up."""
    from vmamba_cli import _results

    numbers = _worker_numbers(workers)
    if out is not None:
        _results.check_folder(out)

    from dataclasses import asdict

    from rich.console import Console

    checked = load("vmamba.train.session", "train").load_recipe(recipe, overrides or [])
    bench = load("vmamba.bench.data", "train")
    console = Console()
    with console.status("reading") as status:
        loadings = [
            bench.bench_loader(checked, number, batches) for number in numbers or [checked.train.workers]
        ]
        status.update("training")
        step = bench.bench_step(checked) if model else None
    table = _table(f"{recipe.stem}, one process")
    for column in ("workers", "images/s", "slowest and fastest round"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in loadings:
        rounds = f"{each.low:,.0f}–{each.high:,.0f}"
        table.add_row(str(each.workers), f"{each.images_per_second:,.0f}", rounds)
    console.print(table)
    if step is not None:
        typer.echo(bench.verdict(loadings, step, checked.train.workers))
    if out is not None:
        rows = [asdict(each) for each in loadings]
        if step is not None:
            rows.append({"model": checked.model.name, "images_per_second": step})
        typer.echo(str(_results.write(out, rows)))


def _worker_numbers(text: str | None) -> list[int]:
    """Parse "0,2,4" as numbers; an empty list for None."""
    if text is None:
        return []
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise typer.BadParameter(f"--workers: expected whole numbers with commas between, got {text!r}")
    return [int(number) for number in numbers]


def _table(title: str) -> Any:
    from rich.table import Table

    # A title wraps at the width of its table.
    return Table(title=title, title_justify="left", box=None, pad_edge=False, min_width=len(title))
