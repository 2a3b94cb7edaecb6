"""`vmamba predict`."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from vmamba_cli._extra import importing
from vmamba_cli._inputs import find_images, require_images
from vmamba_cli._messages import encodable, refuse, say


class Weights(str, Enum):
    auto = "auto"
    raw = "raw"
    ema = "ema"


class Precision(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


TABLES = (".csv", ".json", ".jsonl")
SHEETS = (".png", ".jpg", ".jpeg")
_MANY = 100
"""Least number of images for which progress is shown."""


def command(
    images: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders with all images below them, videos, or globs such as 'photos/**/*.jpg'."
        ),
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
            help="A model's name: its pretrained weights, or with --checkpoint the model or backbone that "
            "the file is of.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Weights,
        typer.Option(help="As trained, their average, or the average where a run's checkpoint has one."),
    ] = Weights.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto",
    precision: Annotated[Precision, typer.Option(help="Of weights and computation.")] = Precision.float32,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images judged at once; by default 16 for classification, else 1.", show_default=False
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1, help="Classes or objects of each image; by default 5 or all.", show_default=False
        ),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Least probability of an object; by default 0.3, or the model's threshold if higher.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Of videos, take the first of so many frames.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also write a table (.csv, .json, .jsonl), a contact sheet (.png, .jpg) or, of objects and "
            "segmentations, a folder of pictures.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what images and videos show."""
    _check(images, checkpoint, model, out)  # before the import below, which takes seconds
    with importing():
        import vmamba
        from vmamba_cli._predictions import writing

    out = None if out is None else out.expanduser()
    inputs = _outside_of(out, list(find_images(images)))
    videos = sum(each.is_video for each in inputs)
    if every > 1 and not videos:
        refuse("--every: of videos, and there is none among these images")
    source = checkpoint if checkpoint is not None else model
    predictor = vmamba.load(
        source,  # type: ignore[arg-type]  # one of them is given
        model=model if checkpoint is not None else None,
        device=device,
        dtype=precision.value,
        weights=weights.value,
    )
    _configure(predictor, min_score, out)
    say(f"{_what(len(inputs) - videos, videos, predictor)}, {predictor.device}, {precision.value}")
    results = _results(predictor, inputs, every, batch_size=batch_size, top="auto" if top is None else top)
    shown = _progress(results, None if videos else len(inputs))
    with nullcontext() if out is None else writing(out, predictor, inputs, bool(videos)) as keep:
        failed, total = _print(_kept(shown, keep), as_json, needed=out is not None)
    if failed:
        from vmamba.words import counted

        say(f"vmamba: {failed:,} of {counted(total, 'image')} could not be judged", error=True)
        raise typer.Exit(1 if failed < total else 2)


def _what(images: int, videos: int, predictor: Any) -> str:
    from vmamba.words import counted

    numbers = [counted(images, "image")] if images or not videos else []
    numbers += [counted(videos, "video")] if videos else []
    return ", ".join([*numbers, counted(len(predictor.classes), "class", "classes")])


def _configure(predictor: Any, min_score: float | None, out: Path | None) -> None:
    """Refuse options that do not suit the predictor's task."""
    from vmamba_cli._predictions import drawable

    if out is not None and _is_folder(out) and not drawable(predictor.task):
        refuse(
            f"--out {out}: a folder of pictures is of detection and segmentation, and this model's task is "
            f"{predictor.task}; expected a name that ends in {', '.join((*TABLES, *SHEETS))}"
        )
    if min_score is None:
        return
    if not hasattr(predictor, "min_score"):
        refuse(f"--min-score: of detection, and this model's task is {predictor.task}")
    try:
        predictor.min_score = min_score
    except ValueError as error:
        refuse(f"--{str(error).replace('_', '-', 1)}")


def _results(predictor: Any, inputs: Sequence[Any], every: int, **options: Any) -> Iterator[Any]:
    """The result for each image, and for each frame of each video, in order."""
    from vmamba_cli._predictions import Result

    for is_video, group in groupby(inputs, lambda each: each.is_video):
        members = list(group)
        if is_video:
            for each in members:
                yield from _of_video(predictor, each, every, options)
            continue
        predictions = predictor.stream([each.path for each in members], **options)
        for each, prediction in zip(members, predictions, strict=True):
            yield Result(each, prediction)


def _of_video(predictor: Any, file: Any, every: int, options: Any) -> Iterator[Any]:
    """The results for frames; if the video is damaged, the last one is the error."""
    from vmamba.data.video import Video
    from vmamba.errors import DataError
    from vmamba.inference import FailedImage
    from vmamba_cli._predictions import Result

    pending: deque[Any] = deque()
    errors: list[DataError] = []

    def images(video: Video) -> Iterator[Any]:
        try:
            for frame in video:
                pending.append(frame)
                yield frame.image
        except DataError as error:  # raised further it would lose the frames of the batch
            errors.append(error)

    try:
        with Video(file.path, every) as video:
            for prediction in predictor.stream(images(video), **options):
                yield Result(file, prediction, pending.popleft(), video)
    except DataError as error:
        errors.append(error)
    for problem in errors:
        yield Result(file, FailedImage(file.path, str(problem)))


def _check(images: Sequence[str], checkpoint: str | None, model: str | None, out: Path | None) -> None:
    if checkpoint is None and model is None:
        refuse("predict: what with? Give --checkpoint RUN, or --model vmamba_tiny for pretrained weights")
    require_images(images)
    if out is None:
        return
    out = out.expanduser()
    if not _is_folder(out) and out.suffix.lower() not in (*TABLES, *SHEETS):
        refuse(
            f"--out {out}: expected a name that ends in {', '.join((*TABLES, *SHEETS))}, or a folder for "
            "pictures: one that exists, or a name without a suffix"
        )
    try:
        out.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # such as a name that is too long
        refuse(f"--out {out}: cannot be written ({error.strerror or error})")
    above = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    exists = os.path.lexists(out)
    in_the_way = exists and _is_folder(out) != os.path.isdir(out)
    if in_the_way or not above.is_dir():
        refuse(f"--out {out}: cannot be written ({out if in_the_way else above} is in the way)")
    if not os.access(out if exists else above, os.W_OK):
        refuse(f"--out {out}: cannot be written (Permission denied)")


def _is_folder(out: Path) -> bool:
    """Whether `--out` is a folder of pictures."""
    return out.suffix == "" or (os.path.isdir(out) and out.suffix.lower() not in (*TABLES, *SHEETS))


def _outside_of(out: Path | None, inputs: list[Any]) -> list[Any]:
    """The files without those that an earlier call wrote into the folder `--out`."""
    from vmamba.errors import DataError
    from vmamba_cli._predictions import MASKS, OVERLAYS

    if out is None or not out.is_dir():
        return inputs
    written = [(out / name).resolve() for name in (OVERLAYS, MASKS)]
    kept = [each for each in inputs if not any(map(Path(each.path).resolve().is_relative_to, written))]
    if not kept:
        raise DataError(f"--out {out}: all images are in it, where an earlier call wrote them")
    if len(kept) < len(inputs):
        say(f"{out}: left out {len(inputs) - len(kept):,} images in it, which an earlier call wrote")
    return kept


def _progress(results: Iterable[Any], total: int | None) -> Iterator[Any]:
    """Show progress on stderr unless stdout shows it: every second on a terminal, else every ten.

    Args:
        results: Of images and frames.
        total: How many they are; None if nobody knows, as of videos.
    """
    terminal = sys.stderr.isatty()
    if (total is not None and total < _MANY) or sys.stdout.isatty():
        yield from results
        return
    start = last = time.monotonic()
    of_all = "" if total is None else f"/{total:,}"
    for number, result in enumerate(results, 1):
        yield result
        now = time.monotonic()
        if now - last > (1 if terminal else 10) or number == total:
            last = now
            line = f"{number:,}{of_all} images, {number / (now - start):.1f} images/s"
            sys.stderr.write(f"\r{line}\033[K" if terminal else f"{line}\n")
            sys.stderr.flush()
    if terminal:
        sys.stderr.write("\n")


def _kept(results: Iterable[Any], keep: Any) -> Iterator[Any]:
    """The results, given to `keep` as well if there is such a function."""
    for result in results:
        if keep is not None:
            keep(result)
        yield result


def _print(results: Iterable[Any], as_json: bool, needed: bool) -> tuple[int, int]:
    """Print each result as it comes.

    Args:
        results: To print.
        as_json: As an array of JSON.
        needed: Whether `--out` needs them too, so that they go on when stdout's reader is gone.

    Returns:
        How many images failed, and how many there were.
    """
    failed = total = 0
    for result in results:
        failed += result.failed
        if result.failed:
            say(f"vmamba: {result.text}", error=True)
        if as_json:
            _emit(f"{',' if total else '['}\n  {result.json()}", needed)
        elif not result.failed:
            _emit(encodable(f"{result.text}\n", sys.stdout), needed)
        total += 1
    _emit("\n]\n" if as_json else "", needed)
    return failed, total


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
            say(f"vmamba: the output cannot be written ({error.strerror or error})", error=True)
        raise typer.Exit(2) from error
