"""`vmamba predict`."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer


class Weights(str, Enum):
    auto = "auto"
    raw = "raw"
    ema = "ema"


class Precision(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


_TABLES = (".csv", ".json", ".jsonl")
_SHEETS = (".png", ".jpg", ".jpeg")
_MANY = 100
"""Least number of images for which progress is shown."""


def command(
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, folders with all below them, or globs such as 'photos/**/*.jpg'."),
    ],
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="A run's folder, a checkpoint, best.safetensors, the authors' .pth, or an address.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model's name: its pretrained weights, or with --checkpoint what that file is of.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(help="As trained, their average, or the average where a run's checkpoint has one."),
    ] = Weights.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    precision: Annotated[Precision, typer.Option(help="Of weights and computation.")] = Precision.float32,
    batch_size: Annotated[int, typer.Option(min=1, help="Images judged at once.")] = 16,
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also write a table (.csv, .json, .jsonl) or a contact sheet (.png, .jpg).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what images show."""
    _check(images, checkpoint, model, out)  # before the import below, which takes seconds
    import vmamba
    from vmamba.words import counted

    paths = list(_find(images))
    source = checkpoint if checkpoint is not None else model
    predictor = vmamba.load(
        source,  # type: ignore[arg-type]  # one of them is given
        model=model if checkpoint is not None else None,
        device=device,
        dtype=precision.value,
        weights=weights.value,
    )
    what = f"{counted(len(paths), 'image')}, {counted(len(predictor.classes), 'class', 'classes')}"
    _say(f"{what}, {predictor.device}, {precision.value}")
    shown = _progress(predictor.stream(paths, batch_size=batch_size, top=top), len(paths))
    with _writing(out, predictor) as keep:
        failed = _print(_kept(shown, keep), as_json, needed=out is not None)
    if failed:
        _say(f"vmamba: {failed:,} of {counted(len(paths), 'image')} could not be judged", error=True)
        raise typer.Exit(1 if failed < len(paths) else 2)


def _refuse(message: str) -> None:
    """Stop with a message, as for a `vmamba.errors.UserError`, without importing the library."""
    _say(f"vmamba: {message}", error=True)
    raise typer.Exit(2)


def _say(message: str, error: bool = False) -> None:
    typer.secho(_encodable(message, sys.stderr), fg=typer.colors.RED if error else None, err=True)


def _encodable(text: str, stream: Any) -> str:
    """The text, with characters that the stream cannot encode and bytes that are not text escaped."""
    text = os.fsencode(text).decode("utf-8", "backslashreplace") if not text.isascii() else text
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _check(images: Sequence[str], checkpoint: str | None, model: str | None, out: Path | None) -> None:
    if checkpoint is None and model is None:
        _refuse("predict: what with? Give --checkpoint RUN, or --model vmamba_tiny for pretrained weights")
    for image in images:
        if not os.path.lexists(os.path.expanduser(image)) and not _is_glob(image):
            _refuse(f"{image}: no such image or folder")
    if out is None:
        return
    out = out.expanduser()
    if out.suffix.lower() not in (*_TABLES, *_SHEETS):
        _refuse(f"--out {out}: expected a name that ends in {', '.join((*_TABLES, *_SHEETS))}")
    above = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    folder = os.path.isdir(out)
    if folder or not above.is_dir():
        _refuse(f"--out {out}: cannot be written ({out if folder else above} is in the way)")
    if not os.access(out if os.path.exists(out) else above, os.W_OK):
        _refuse(f"--out {out}: cannot be written (Permission denied)")


def _is_glob(text: str) -> bool:
    return any(char in text for char in "*?[")


def _find(images: Iterable[str]) -> Iterator[str]:
    """The image files named; from folders and globs those that are not hidden, sorted by name."""
    import glob

    from vmamba.errors import DataError

    for image in images:
        path = os.path.expanduser(image)
        if os.path.isdir(path):
            yield from _in_folder(path)
        elif os.path.lexists(path):
            yield path
        else:
            matches = sorted(glob.glob(path, recursive=True))
            files = [match for match in matches if not os.path.isdir(match)]
            if not files:
                raise DataError(f"{image}: no file has such a name")
            yield from files


def _in_folder(folder: str) -> Iterator[str]:
    from vmamba.data.finding import LeftOut, find_images
    from vmamba.errors import DataError

    left_out = LeftOut()
    names = find_images(folder, left_out)
    if not names:
        raise DataError(
            f"{folder}: no images in this folder or below{f'; {left_out}' if str(left_out) else ''}"
        )
    if str(left_out):
        _say(f"{folder}: left out {left_out}")
    for name in names:
        yield os.path.join(folder, name)


def _progress(predictions: Iterable[Any], total: int) -> Iterator[Any]:
    """Show progress on stderr unless stdout shows it: every second on a terminal, else every ten."""
    terminal = sys.stderr.isatty()
    if total < _MANY or sys.stdout.isatty():
        yield from predictions
        return
    start = last = time.monotonic()
    for number, prediction in enumerate(predictions, 1):
        yield prediction
        now = time.monotonic()
        if now - last > (1 if terminal else 10) or number == total:
            last = now
            line = f"{number:,}/{total:,} images, {number / (now - start):.1f} images/s"
            sys.stderr.write(f"\r{line}\033[K" if terminal else f"{line}\n")
            sys.stderr.flush()
    if terminal:
        sys.stderr.write("\n")


def _kept(predictions: Iterable[Any], keep: Any) -> Iterator[Any]:
    for prediction in predictions:
        keep(prediction)
        yield prediction


def _print(predictions: Iterable[Any], as_json: bool, needed: bool) -> int:
    """Print each prediction as it comes.

    Args:
        predictions: To print.
        as_json: As an array of JSON.
        needed: Whether `--out` needs them too, so that they go on when stdout's reader is gone.

    Returns:
        How many images failed.
    """
    from vmamba.inference import FailedImage

    failed = 0
    for number, prediction in enumerate(predictions):
        wrong = isinstance(prediction, FailedImage)
        failed += wrong
        if wrong:
            _say(f"vmamba: {prediction.text()}", error=True)
        if as_json:
            _emit(f"{',' if number else '['}\n  {_json(prediction)}", needed)
        elif not wrong:
            _emit(_encodable(f"{prediction.image}: {prediction.text()}\n", sys.stdout), needed)
    _emit("\n]\n" if as_json else "", needed)
    return failed


def _emit(text: str, needed: bool) -> None:
    """Write to stdout; if the disk is full, stop with one line; if the reader is gone, end quietly."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Otherwise Python would fail again at exit, when it flushes the rest of the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError) and needed:
            return
        if not isinstance(error, BrokenPipeError):
            _say(f"vmamba: the output cannot be written ({error.strerror or error})", error=True)
        raise typer.Exit(2) from error


def _json(prediction: Any) -> str:
    """One line of JSON; bytes of a file name that are not text are escaped as on a terminal."""
    import json
    from dataclasses import asdict

    from vmamba.data.decoding import printable

    return json.dumps({**asdict(prediction), "image": printable(prediction.image)}, allow_nan=False)


@contextmanager
def _writing(out: Path | None, predictor: Any) -> Iterator[Any]:
    """A function to call with each prediction for the file `--out`, which is created when all are done."""
    from vmamba.errors import OutputError

    if out is None:
        yield lambda prediction: None
        return
    out = out.expanduser()
    try:
        if out.suffix.lower() in _SHEETS:
            with _sheet(out, predictor) as keep:
                yield keep
        else:
            with _table(out) as keep:
                yield keep
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written ({error.strerror or error})") from error


@contextmanager
def _table(out: Path) -> Iterator[Any]:
    from vmamba.files import replacing

    kind = out.suffix.lower()
    rows = 0
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:

        def keep(prediction: Any) -> None:
            nonlocal rows
            if kind == ".csv":
                _write_row(file, prediction, first=not rows)
            else:
                start = "" if kind == ".jsonl" else ",\n  " if rows else "[\n  "
                file.write(start + _json(prediction) + ("\n" if kind == ".jsonl" else ""))
            rows += 1

        yield keep
        if kind == ".json":
            file.write("\n]\n")


def _write_row(file: Any, prediction: Any, first: bool) -> None:
    """Columns: image, best label, its score, all labels with their scores, error."""
    import csv

    from vmamba.data.decoding import printable
    from vmamba.inference import Classification, FailedImage

    writer = csv.writer(file)
    if first:
        writer.writerow(["image", "label", "score", "all", "error"])
    row: list[Any] = [printable(prediction.image)]
    if isinstance(prediction, Classification):
        best = prediction.classes[0]
        row += [best.label, f"{best.score:.6f}"]
        row += ["; ".join(f"{each.label} {each.score:.6f}" for each in prediction.classes), ""]
    else:
        wrong = isinstance(prediction, FailedImage)
        row += ["", "", "" if wrong else prediction.text(), prediction.text() if wrong else ""]
    writer.writerow(row)


@contextmanager
def _sheet(out: Path, predictor: Any) -> Iterator[Any]:
    from vmamba.data.contact_sheet import MOST, draw_sheet

    predictions: list[Any] = []
    total = 0

    def keep(prediction: Any) -> None:
        nonlocal total
        total += 1
        if total <= MOST:
            predictions.append(prediction)

    yield keep
    draw_sheet([_cell(prediction, predictor) for prediction in predictions], out)
    if total > MOST:
        _say(f"{out}: shows the first {MOST:,} of {total:,} images")


def _cell(prediction: Any, predictor: Any) -> Any:
    """A cell of a contact sheet; its image is read again, so that no images are held in memory."""
    from vmamba.data.contact_sheet import Cell, picture
    from vmamba.data.decoding import printable
    from vmamba.errors import DataError
    from vmamba.inference import Classification, FailedImage

    name = printable(prediction.image)
    if isinstance(prediction, FailedImage):
        return Cell(name, None, prediction.text().removeprefix(f"{name}: "))
    try:
        image = picture(predictor.preprocessing.read(prediction.image))
    except DataError as error:
        return Cell(name, None, str(error).removeprefix(f"{name}: "))
    if isinstance(prediction, Classification):
        best = prediction.classes[0]
        return Cell(name, image, best.label, f"{best.score:.0%}")
    return Cell(name, image, prediction.text())
