"""`vmamba bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="bench", no_args_is_help=True, rich_markup_mode="rich", help="Measure speed and memory side by side."
)

Sizes = Annotated[list[int], typer.Option("--input", help="Side of the images; may be given several times.")]
Batches = Annotated[list[int], typer.Option("--batch", help="Images at once; may be given several times.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")]
Rounds = Annotated[int, typer.Option(min=1, help="How often all run in turns.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default PyTorch's own.")]
Out = Annotated[Path | None, typer.Option(help="Folder for results.json and the plot.")]


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
        str | None, typer.Option(help="The scan's engine; default the device's engine of choice.")
    ] = None,
    device: Device = "cpu",
    rounds: Rounds = 10,
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Throughput of models, in turns in one process, after a check of what they compute."""
    from contextlib import nullcontext

    import torch
    from rich.console import Console
    from rich.table import Table

    from vmamba.analysis import throughput
    from vmamba.ops import use_backend

    if autocast not in (None, "bf16", "fp16"):
        raise typer.BadParameter(f"--autocast: expected bf16 or fp16, got {autocast!r}")
    _prepare(device, threads)
    names = names or ["vmamba_tiny", *throughput.PEERS]
    rows: list[dict[str, Any]] = []
    console = Console()
    for pixels in size:
        for images in batch:
            setting = throughput.Setting(pixels, images, train, autocast, device)
            with console.status("…") as status, use_backend(backend) if backend else nullcontext():
                found = throughput.bench_models(names, setting, rounds, memory, status.update)
            mode = ("training step" if train else "inference") + (
                f", {autocast} autocast" if autocast else ""
            )
            table = Table(
                title=f"{mode}, {pixels}², batch {images}, {device}, {torch.get_num_threads()} threads",
                title_justify="left",
                box=None,
                pad_edge=False,
            )
            table.add_column("model", no_wrap=True)
            for column in ("images/s", f"{names[0]} is", "quartiles", *(["peak MB"] if memory else [])):
                table.add_column(column, justify="right", no_wrap=True)
            for m in found:
                peak = "–" if m.peak_memory is None else f"{m.peak_memory / 2**20:,.0f}"
                table.add_row(
                    *(m.model, f"{m.images_per_second:.2f}", f"{m.ratio.median:.2f} ×"),
                    *(f"{m.ratio.low:.2f}–{m.ratio.high:.2f}", *([peak] if memory else [])),
                )
            console.print(table)
            rows += throughput.to_rows(found, setting)
    if out is not None:
        _write(out, rows)
        throughput.draw(rows, out / "throughput.png")
        console.print(f"{out / 'results.json'} and {out / 'throughput.png'}")


@app.command("ops")
def ops(
    model: Annotated[str, typer.Argument(help="The model whose scans are measured.")] = "vmamba_tiny",
    size: Annotated[int, typer.Option("--input", help="Side of the images.")] = 224,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at once.")] = 8,
    device: Device = "cpu",
    rounds: Rounds = 10,
    threads: Threads = None,
    out: Out = None,
) -> None:
    """Speed of the scan's engines, of mambapy where it is installed, and of the exponentials alone."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from vmamba.analysis import operator_throughput as operator

    _prepare(device, threads)
    console = Console()
    rows = []
    for backward in (False, True):
        table = Table(
            title=f"{model}'s scans, {size}², batch {batch}, forward" + (" and backward" if backward else ""),
            title_justify="left",
            box=None,
            pad_edge=False,
        )
        for column in ("shape", "engine", "ns a value", "first is", "quartiles"):
            table.add_column(
                column, justify="left" if column in ("shape", "engine") else "right", no_wrap=True
            )
        found = []
        for shape in operator.shapes(model, size):
            with console.status(f"{shape.height}×{shape.width}, {shape.channels} channels"):
                measured = operator.bench_operator(
                    shape, batch, backward=backward, device=device, rounds=rounds
                )
            for m in measured:
                text = f"{shape.height}×{shape.width}×{shape.channels}, N {shape.n_state}, R {shape.rank}"
                table.add_row(
                    *(text, m.engine, f"{m.nanoseconds:.3f}", f"{m.ratio.median:.2f} ×"),
                    f"{m.ratio.low:.2f}–{m.ratio.high:.2f}",
                )
            found += measured
        for (engine, _), seconds in operator.model_totals(found).items():
            table.add_row("all of an image", engine, f"{seconds * 1e3:.2f} ms", "", "")
        console.print(table)
        rows += [asdict(m) for m in found]
    console.print("A value is one (position, channel, route).")
    if out is not None:
        _write(out, rows)
        console.print(str(out / "results.json"))


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
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from vmamba_cli._extra import load

    checked = load("vmamba.train.session", "train").load_recipe(recipe, overrides or [])
    bench = load("vmamba.train.throughput", "train")
    try:
        numbers = [int(number) for number in (workers or str(checked.train.workers)).split(",")]
    except ValueError:
        numbers = [-1]
    if min(numbers) < 0:
        raise typer.BadParameter(f"--workers: expected whole numbers with commas between, got {workers!r}")
    console = Console()
    with console.status("reading") as status:
        found = [bench.bench_loader(checked, number, batches) for number in numbers]
        status.update("training")
        step = bench.bench_step(checked) if model else None
    table = Table(title=f"{recipe.stem}, one process", title_justify="left", box=None, pad_edge=False)
    for column in ("workers", "images/s", "slowest and fastest round"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in found:
        table.add_row(
            str(each.workers), f"{each.images_per_second:,.0f}", f"{each.low:,.0f}–{each.high:,.0f}"
        )
    console.print(table)
    if step is not None:
        typer.echo(bench.verdict(found, step, checked.train.workers))
    if out is not None:
        rows = [asdict(each) for each in found]
        _write(out, [*rows, *([{"model": checked.model.name, "images_per_second": step}] if model else [])])
        typer.echo(str(out / "results.json"))


def _prepare(device: str, threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {device}: {str(error).splitlines()[0]}") from error


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    import json

    from vmamba.environment import environment

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(
        json.dumps({"environment": environment(), "results": rows}, indent=2) + "\n", encoding="utf-8"
    )
