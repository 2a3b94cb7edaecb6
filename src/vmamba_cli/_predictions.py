"""What `vmamba predict --out` writes: tables, COCO's format, contact sheets, folders of pictures."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vmamba.data.contact_sheet import MOST, Cell, draw_sheet, picture, thumbnail
from vmamba.data.decoding import printable
from vmamba.data.overlay import colour, draw_objects, draw_segmentation
from vmamba.data.video import Frame, Video, is_video_name, writing_video
from vmamba.errors import DataError, OutputError
from vmamba.files import replacing, write_atomically
from vmamba.inference import Classification, FailedImage, Prediction
from vmamba_cli._messages import say
from vmamba_cli.predict import SHEETS, TABLES


@dataclass(frozen=True, eq=False)
class Input:
    """A file to predict.

    Attributes:
        path: Where it is.
        name: Its path in the folder that was named, or else the file's name.
    """

    path: str
    name: str

    @property
    def is_video(self) -> bool:
        return is_video_name(self.path)


@dataclass(frozen=True)
class Result:
    """The prediction for an image or a frame.

    Attributes:
        input: The file.
        prediction: What was predicted, or why not.
        frame: Of a video; None for an image, and for an error of a whole video.
        video: The frame's video.
    """

    input: Input
    prediction: Prediction
    frame: Frame | None = None
    video: Video | None = None

    @property
    def failed(self) -> bool:
        return isinstance(self.prediction, FailedImage)

    @property
    def name(self) -> str:
        """For people."""
        name = printable(self.input.path)
        return (
            name if self.frame is None else f"{name}, frame {self.frame.number} ({self.frame.seconds:.2f} s)"
        )

    @property
    def text(self) -> str:
        """The prediction in words, with the name."""
        text = self.prediction.text()
        # An image's error begins with its name, the error of a frame or of an image in memory does not.
        return text if self.failed and self.frame is None else f"{self.name}: {text}"

    @property
    def place(self) -> dict[str, Any]:
        """Which image or frame it is, in plain values."""
        image = {"image": printable(self.input.path)}
        if self.frame is None:
            return image
        return {**image, "frame": self.frame.number, "seconds": round(self.frame.seconds, 6)}

    def json(self) -> str:
        """One line of JSON; bytes of a file name that are not text are escaped as on a terminal."""
        return json.dumps({**asdict(self.prediction), **self.place}, allow_nan=False)

    def picture(self, predictor: Any) -> Image.Image:
        """The image, read again so that none is held in memory.

        Raises:
            DataError: It cannot be read any more.
        """
        if self.frame is not None:
            return self.frame.image
        return picture(predictor.preprocessing.read(self.input.path))


Keep = Callable[[Result], None]


@contextmanager
def writing(out: Path, predictor: Any, inputs: Sequence[Input], videos: bool) -> Iterator[Keep]:
    """A function to call with each result; what it writes is complete only after the block.

    Args:
        out: A file by its suffix, or a folder.
        predictor: Of the results.
        inputs: All files that will be predicted.
        videos: Whether videos are among them.

    Raises:
        OutputError: It cannot be written.
    """
    suffix = out.suffix.lower()
    try:
        with ExitStack() as stack:
            if suffix in SHEETS:
                yield stack.enter_context(_sheet(out, predictor))
            elif suffix == ".csv":
                yield stack.enter_context(_csv(out, predictor.task, videos))
            elif suffix == ".json" and predictor.task == "detection":
                yield stack.enter_context(_coco(out, predictor))
            elif suffix in TABLES:
                yield stack.enter_context(_json(out))
            else:
                yield stack.enter_context(_folder(out, predictor, inputs))
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written ({error.strerror or error})") from error


@contextmanager
def _json(out: Path) -> Iterator[Keep]:
    """A list of JSON objects, or one a line."""
    by_line = out.suffix.lower() == ".jsonl"
    rows = 0
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:

        def keep(result: Result) -> None:
            nonlocal rows
            start = "" if by_line else ",\n  " if rows else "[\n  "
            file.write(start + result.json() + ("\n" if by_line else ""))
            rows += 1

        yield keep
        if not by_line:
            file.write("\n]\n")


_COLUMNS = {
    "detection": ["label", "score", "x1", "y1", "x2", "y2"],
    "segmentation": ["label", "share"],
}
"""Columns of a table with a row for each object or class; others have one for each image."""


@contextmanager
def _csv(out: Path, task: str, videos: bool) -> Iterator[Keep]:
    place = ["image", "frame", "seconds"] if videos else ["image"]
    values = _COLUMNS.get(task, ["label", "score", "all"])
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*place, *values, "error"], restval="")
        writer.writeheader()

        def keep(result: Result) -> None:
            for row in _rows(result.prediction):
                writer.writerow({**result.place, **row})

        yield keep


def _rows(prediction: Any) -> list[dict[str, Any]]:
    """The rows of a prediction by column; an image without objects has one."""
    if isinstance(prediction, FailedImage):
        return [{"error": prediction.text()}]
    if isinstance(prediction, Classification):
        best = prediction.classes[0]
        everything = "; ".join(f"{each.label} {each.score:.6f}" for each in prediction.classes)
        return [{"label": best.label, "score": f"{best.score:.6f}", "all": everything}]
    if hasattr(prediction, "objects"):
        return [
            {
                "label": each.label,
                "score": f"{each.score:.6f}",
                **{
                    side: f"{edge:.2f}" for side, edge in zip(("x1", "y1", "x2", "y2"), each.box, strict=True)
                },
            }
            for each in prediction.objects
        ] or [{}]
    if hasattr(prediction, "labels"):
        return [{"label": each.label, "share": f"{each.share:.6f}"} for each in prediction.classes]
    return [{"all": prediction.text()}]


@contextmanager
def _coco(out: Path, predictor: Any) -> Iterator[Callable[..., None]]:
    """A data set in COCO's format whose annotations have scores; images that failed are left out.

    The function that it gives also takes further plain values for the image's record.
    """
    from vmamba.data.objects import run_lengths

    images: list[dict[str, Any]] = []
    number = 0
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write('{"annotations": [')

        def keep(result: Result, **more: Any) -> None:
            nonlocal number
            if result.failed:
                return
            detection: Any = result.prediction
            height, width = detection.size
            place = result.place
            record = {"id": len(images) + 1, "file_name": place.pop("image"), "width": width}
            images.append({**record, "height": height, **place, **more})
            for each in detection.objects:
                number += 1
                x1, y1, x2, y2 = each.box
                annotation = {
                    "id": number,
                    "image_id": len(images),
                    "category_id": each.category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": each.score,
                    "segmentation": each.mask,
                    "area": int(run_lengths().area(each.mask)),
                    "iscrowd": 0,
                }
                file.write(("," if number > 1 else "") + "\n" + json.dumps(annotation, allow_nan=False))

        yield keep
        pairs = zip(predictor.category_ids, predictor.classes, strict=True)
        categories = [{"id": category, "name": name} for category, name in pairs]
        file.write(f'\n],\n"images": {_lines(images)},\n"categories": {_lines(categories)}}}\n')


def _lines(values: Sequence[Mapping[str, Any]]) -> str:
    """A list in JSON with a line for each value."""
    return "[\n" + ",\n".join(json.dumps(value) for value in values) + "\n]"


@contextmanager
def _sheet(out: Path, predictor: Any) -> Iterator[Keep]:
    cells: list[Cell] = []
    total = 0

    def keep(result: Result) -> None:
        nonlocal total
        total += 1
        if total <= MOST:
            cells.append(_cell(result, predictor))

    yield keep
    draw_sheet(cells, out)
    if total > MOST:
        say(f"{out}: shows the first {MOST:,} of {total:,} images")


def _cell(result: Result, predictor: Any) -> Cell:
    prediction: Any = result.prediction
    name = result.name
    if result.failed:
        return Cell(name, None, prediction.text().removeprefix(f"{name}: "))
    try:
        image = result.picture(predictor)
    except DataError as error:
        return Cell(name, None, str(error).removeprefix(f"{name}: "))
    if isinstance(prediction, Classification):
        best = prediction.classes[0]
        return Cell(name, thumbnail(image), best.label, f"{best.score:.0%}")
    drawn = overlay(image, prediction, predictor, legend=False) if drawable(predictor.task) else image
    return Cell(name, thumbnail(drawn), prediction.text())


def drawable(task: str) -> bool:
    """Whether predictions of a task are drawn over images."""
    return task in ("detection", "segmentation")


def overlay(
    image: Image.Image, prediction: Any, predictor: Any, *, legend: bool, side: int | None = None
) -> Image.Image:
    """An image with the objects or classes drawn over it; see `vmamba.data.overlay`."""
    import torch

    if predictor.task == "segmentation":
        return draw_segmentation(image, prediction.labels, predictor.classes, legend=legend, side=side)
    objects = prediction.objects
    indices = {category: index for index, category in enumerate(predictor.category_ids)}
    return draw_objects(
        image,
        torch.tensor([each.box for each in objects]).reshape(-1, 4),
        torch.tensor([indices[each.category] for each in objects], dtype=torch.long),
        torch.tensor([each.score for each in objects]),
        [each.mask for each in objects],
        predictor.classes,
        legend=legend,
        side=side,
    )


OVERLAYS, MASKS = "overlays", "masks"
"""The folders in the folder `--out`."""


def output_names(inputs: Sequence[Input]) -> dict[Input, str]:
    """A path without suffix for what is written of each input: its name, numbered where another has the same.

    A video's is also the folder of its masks, so that it is not that of other inputs. Cases are not told
    apart, as by the file systems of macOS and Windows.
    """
    folders = {parent.as_posix().casefold() for each in inputs for parent in Path(each.name).parents}
    names: dict[Input, str] = {}
    used: set[str] = set()
    for each in inputs:
        stem = name = Path(each.name).with_suffix("").as_posix()
        number = 1
        while name.casefold() in used or (each.is_video and name.casefold() in folders):
            number += 1
            name = f"{stem}-{number}"
        used.add(name.casefold())
        names[each] = name
    return names


@contextmanager
def _folder(out: Path, predictor: Any, inputs: Sequence[Input]) -> Iterator[Keep]:
    with ExitStack() as stack:
        pictures = stack.enter_context(_Pictures(out, predictor, output_names(inputs)))
        of_images: Callable[..., None] | None = None
        of_frames: Keep | None = None
        listed: list[dict[str, Any]] = []

        def keep(result: Result) -> None:
            nonlocal of_images, of_frames
            files = {} if result.failed else pictures.write(result)
            if result.input.is_video:
                if of_frames is None:
                    of_frames = stack.enter_context(_json(out / "predictions.jsonl"))
                of_frames(result)
            elif predictor.task == "segmentation":
                listed.append({**asdict(result.prediction), **result.place, **files})
            else:
                if of_images is None:
                    of_images = stack.enter_context(_coco(out / "predictions.json", predictor))
                of_images(result, **files)

        yield keep
        if predictor.task == "segmentation":
            classes = [
                {"id": index, "name": name, "colour": colour(index)}
                for index, name in enumerate(predictor.classes)
            ]
            text = f'{{"classes": {_lines(classes)},\n"images": {_lines(listed)}}}\n'
            write_atomically(out / "classes.json", text)


class _Pictures:
    """Writes overlays and masks into a folder: of a video an overlay video, and a mask for each frame.

    Args:
        out: The folder.
        predictor: Of the predictions.
        names: Of what is written of each input.
    """

    def __init__(self, out: Path, predictor: Any, names: Mapping[Input, str]) -> None:
        self._out, self._predictor, self._names = out, predictor, names
        self._stack = ExitStack()
        self._video: tuple[Video, Any] | None = None

    def __enter__(self) -> "_Pictures":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def write(self, result: Result) -> dict[str, str]:
        """The paths of what was written, in the folder, with "/" and printable."""
        name = self._names[result.input]
        files = {"overlay": self._overlay(result, name)}
        if self._predictor.task == "segmentation":
            frame = "" if result.frame is None else f"/{result.frame.number:06}"
            files["mask"] = f"{MASKS}/{name}{frame}.png"
            prediction: Any = result.prediction
            mask = Image.fromarray(prediction.labels)
            mask.putpalette(bytes(value for index in range(256) for value in colour(index)))
            with replacing(self._out / files["mask"]) as temporary:
                mask.save(temporary, "PNG")
        return {kind: printable(path) for kind, path in files.items()}

    def _overlay(self, result: Result, name: str) -> str:
        if result.frame is not None:
            path = f"{OVERLAYS}/{name}.mp4"
            image = result.frame.image
            drawn = overlay(image, result.prediction, self._predictor, legend=False, side=max(image.size))
            self._writer(result, path)(drawn, result.frame.seconds)
            return path
        suffix = Path(result.input.name).suffix.lower()
        kind, suffix = ("JPEG", suffix) if suffix in (".jpg", ".jpeg") else ("PNG", ".png")
        path = f"{OVERLAYS}/{name}{suffix}"
        image = result.picture(self._predictor)
        drawn = overlay(image, result.prediction, self._predictor, legend=True)
        with replacing(self._out / path) as temporary:
            drawn.save(temporary, kind, **({"quality": 92} if kind == "JPEG" else {}))
        return path

    def _writer(self, result: Result, path: str) -> Any:
        """The function that writes pictures of the result's video; that of the video before is ended."""
        video, frame = result.video, result.frame
        assert video is not None
        assert frame is not None
        if self._video is None or self._video[0] is not video:
            self._stack.close()
            writer = writing_video(self._out / path, frame.image.size, video.rate, video.time_base)
            self._video = video, self._stack.enter_context(writer)
        return self._video[1]
