"""What `vmamba analyze` does once its arguments are checked. Imports PyTorch and the library: seconds."""

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import vmamba
from vmamba.analysis import receptive_field as erf
from vmamba.analysis import routes
from vmamba.analysis.attention import ScanAttention, scan_attention
from vmamba.analysis.attention_figure import Panel, draw, draw_panel
from vmamba.analysis.backbones import backbone, read_input, shown
from vmamba.analysis.complexity import ModuleComplexity, count_modules, parse_size
from vmamba.data.decoding import as_floats, read_image
from vmamba.data.video import is_video_name
from vmamba.errors import CheckpointError, DataError
from vmamba.files import replacing
from vmamba.inference import Predictor
from vmamba.models.checkpoints import Weights
from vmamba.models.factory import create_on_meta
from vmamba.ops.routes import ROUTES, SIZED_ROUTES
from vmamba.words import counted
from vmamba_cli._inputs import find_images
from vmamba_cli._messages import say


@dataclass(frozen=True)
class Source:
    """A model as the user names it.

    Attributes:
        text: A run, a checkpoint or a model's name, as `vmamba.load` takes it.
        device: As `vmamba.load` takes it.
        weights: Which of a checkpoint's weights.
        seed: Of new weights.
        model: The model's name, for a file that does not contain it.
    """

    text: str
    device: str
    weights: Weights
    seed: int
    model: str | None = None

    def load(self, trained: bool) -> Predictor:
        """The model, trained or with new weights.

        Raises:
            CheckpointError: There are no weights of it.
        """
        torch.manual_seed(self.seed)
        try:
            return vmamba.load(
                self.text, model=self.model, device=self.device, weights=self.weights, trained=trained
            )
        except CheckpointError as error:
            if not trained or Path(self.text).expanduser().exists():
                raise
            raise CheckpointError(f"{error}; --untrained takes the model without weights") from error


def short_names(texts: Sequence[str]) -> list[str]:
    """The last component of each path, or all of it where two would be equal."""
    names = [Path(text).name or text for text in texts]
    return [name if names.count(name) == 1 else text for name, text in zip(names, texts, strict=True)]


def image_paths(images: Iterable[str]) -> list[str]:
    """The images that are named, without videos among them.

    Raises:
        DataError: One is a video, or there is none.
    """
    paths = [each.path for each in find_images(images)]
    for path in paths:
        if is_video_name(path):
            raise DataError(f"{path}: a video; an analysis is of images, such as its frames")
    return paths


def sampled(paths: Sequence[str], number: int, seed: int) -> list[str]:
    """At most so many of the paths, drawn at random, in their order."""
    if len(paths) <= number:
        return list(paths)
    return [paths[index] for index in sorted(random.Random(seed).sample(range(len(paths)), number))]


@dataclass(frozen=True)
class Field:
    """The effective receptive field of a model.

    Attributes:
        model: Its name.
        trained: Whether it was trained.
        images: Over how many images it is the mean.
        values: (h, w).
    """

    model: str
    trained: bool
    images: int
    values: Tensor

    @property
    def title(self) -> str:
        return _title(self.model, self.trained)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The areas that hold shares of the contribution, a row each."""
        height, width = self.values.shape
        for share in erf.SHARES:
            yield {
                "model": self.model,
                "trained": self.trained,
                "images": self.images,
                "height": height,
                "width": width,
                "share": share,
                "area": round(erf.high_contribution_ratio(self.values, share), 6),
            }


def _title(model: str, trained: bool) -> str:
    return f"{model}, {'trained' if trained else 'untrained'}"


def receptive_fields(
    sources: Sequence[Source], paths: Sequence[str], size: str | None, kinds: Sequence[bool]
) -> list[Field]:
    """The fields of every model, untrained or trained as `kinds` says, in the order of the figure.

    Args:
        sources: The models.
        paths: The images.
        size: Of the images, as the user gave it; None for each model's own.
        kinds: Whether trained, for each row of the figure.
    """
    shape = None if size is None else parse_size(size)
    names = short_names([each.text for each in sources])
    fields = {}
    for name, source in zip(names, sources, strict=True):
        for trained in reversed(kinds):  # a model without weights shall fail before the work on it
            predictor = source.load(trained)
            preprocessing = predictor.preprocessing
            height, width = shape or preprocessing.size
            images = counted(len(paths), "image")
            say(f"{_title(name, trained)}: {images} of {height}x{width}, {predictor.device}")
            inputs = (read_input(path, preprocessing, shape) for path in paths)
            network = backbone(predictor.model, (preprocessing.channels, height, width), gradient=True)
            values = erf.receptive_field(network, inputs)
            fields[trained, name] = Field(name, trained, len(paths), values)
    return [fields[trained, name] for trained in kinds for name in dict.fromkeys(names)]


def write_fields(fields: Sequence[Field], out: Path, models: int) -> None:
    """Write the picture, the areas as a table, and the maps themselves.

    Args:
        fields: The untrained of all models, then the trained: a row each; of one model they are one row.
        out: The folder.
        models: How many there are.
    """
    columns = models if models > 1 else None
    erf.draw({field.title: field.values for field in fields}, out / "erf.png", columns)
    write_table(out / "erf.csv", [row for field in fields for row in field.rows()])
    write_arrays(out / "erf.npz", {field.title: field.values for field in fields})


@dataclass(frozen=True, eq=False)
class View:
    """A scan of an image, and what a figure says of it.

    Attributes:
        scan: The scan.
        picture: The image as the model saw it, (c, h, w) in [0, 1].
        title: The model and the SS2D.
    """

    scan: ScanAttention
    picture: Tensor
    title: str


def view_scan(
    source: Source,
    image: str,
    size: str | None,
    trained: bool,
    stage: int,
    block: int,
    module: str | None,
) -> View:
    """The scan of an SS2D on an image.

    Args:
        source: The model.
        image: Path of the image.
        size: Of the model's input, as the user gave it; None for the model's own.
        trained: Whether with its weights.
        stage: Of the block.
        block: In its stage.
        module: Name of the SS2D in the backbone, instead of stage and block.

    Raises:
        DataError: There are several images, or it cannot be read.
        AttentionError: There is no such SS2D.
    """
    path, *others = image_paths([image])
    if others:
        raise DataError(f"{image}: {1 + len(others)} images, and the figure is of one")
    shape = None if size is None else parse_size(size)
    predictor = source.load(trained)
    height, width = shape or predictor.preprocessing.size
    network = backbone(predictor.model, (predictor.preprocessing.channels, height, width))
    pixels = read_input(path, predictor.preprocessing, shape)
    scan = scan_attention(network, pixels, stage=stage, block=block, module=module)
    place = f"stage {stage}, block {block}" if module is None else module
    state = "" if trained else ", untrained"
    height, width = scan.size
    title = f"{short_names([source.text])[0]}{state}: {place}, {height} × {width} positions"
    return View(scan, shown(pixels, predictor.preprocessing), title)


def write_attention(
    view: View, drawn: Sequence[Panel], query: tuple[float, float], out: Path, alone: bool
) -> list[Path]:
    """Write the figure, the values, and the panels by themselves if they are wanted; returns the files.

    Args:
        view: The scan.
        drawn: From `panels`.
        query: (x, y) of the query.
        out: The folder.
        alone: Whether to write every panel by itself.
    """
    files = [out / "attention.png", out / "attention.npz"]
    draw(drawn, view.picture, query, view.title, files[0])
    write_arrays(files[1], {"orders": view.scan.orders, **{panel.name: panel.values for panel in drawn}})
    if alone:
        folder = out / "panels"
        folder.mkdir(exist_ok=True)
        for panel in drawn:
            draw_panel(panel, folder / f"{panel.name}.png")
        files.append(folder)
    return files


def named_routes(named: Sequence[str], order: Path | None, grid: str) -> dict[str, list[routes.Route]]:
    """Sets of routes that the user names or gives as permutations, by their titles.

    Args:
        named: Sets of routes: a set's name, or names of routes with commas between.
        order: A file of permutations.
        grid: Height and width in positions, as the user gave it.

    Raises:
        RouteError: There is no such route, or a permutation does not fit the grid.
        DataError: The file has no whole numbers in it.
    """
    size = parse_size(grid, "--grid", "7 or 5x9")
    sets = {text: routes.routes_of(text.split(",") if "," in text else _one(text), size) for text in named}
    if order is not None:
        sets[order.name] = routes.routes_of(_permutations(order), size)
    return sets


def _one(text: str) -> str | list[str]:
    """A set's name, or the only route of a set."""
    return [text] if text.partition(":")[0] in (*ROUTES, *SIZED_ROUTES) else text


def _permutations(path: Path) -> list[Tensor]:
    try:
        values = np.load(path) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64)
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path}: expected permutations, a line of whole numbers each, or a .npy file: {error}"
        ) from error
    return list(torch.from_numpy(np.atleast_2d(values)))


def model_routes(source: Source, size: str | None) -> dict[str, list[routes.Route]]:
    """The different sets of routes in a model, by their titles.

    Args:
        source: The model; its weights are not needed.
        size: Of the input, as the user gave it; None for the model's own.
    """
    predictor = source.load(trained=False)
    height, width = predictor.preprocessing.size if size is None else parse_size(size)
    input_size = predictor.preprocessing.channels, height, width
    sets = routes.routes_in(backbone(predictor.model, input_size), input_size)
    name = short_names([source.text])[0]
    return {f"{name}: {title}" if len(sets) > 1 else name: each for title, each in sets.items()}


def write_routes(sets: Mapping[str, Sequence[routes.Route]], image: str | None, out: Path) -> list[Path]:
    """Write the figure and the orders; returns the files.

    Args:
        sets: The routes, by titles.
        image: Path of a picture to show behind them.
        out: The folder.
    """
    files = [out / "routes.png", out / "routes.npz"]
    picture = None if image is None else as_floats(read_image(image))
    routes.draw(sets, files[0], picture)
    write_arrays(
        files[1],
        {
            f"{title}, {number} {route.name}": torch.stack(list(route.paths))
            for title, each in sets.items()
            for number, route in enumerate(each)
        },
    )
    return files


def complexity_rows(name: str, size: str | None, depth: int) -> list[dict[str, Any]]:
    """The counts of a model's modules, a row each, parents before their children.

    Args:
        name: Of a model of timm's.
        size: Of the image, as the user gave it; None for the model's own.
        depth: Levels of modules below the model.
    """
    given = None if size is None else parse_size(size)
    model = create_on_meta(name, given)
    channels, *default = model.pretrained_cfg["input_size"]
    height, width = given or default
    tree = count_modules(model, (channels, height, width))

    def rows(node: ModuleComplexity, path: str, level: int) -> Iterator[dict[str, Any]]:
        yield {"module": path, "level": level, "kind": node.kind, **asdict(node.counts)}
        for child in node.children if level < depth else ():
            if child.counts.parameters or child.counts.macs:
                yield from rows(child, f"{path}.{child.name}" if path else child.name, level + 1)

    return list(rows(tree, "", 0))


def print_complexity(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print the rows of `complexity_rows` as a table, or as JSON."""
    if as_json:
        typer.echo(json.dumps(list(rows), indent=2))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("module", no_wrap=True)
    for title in ("parameters", "GMACs", "for-loop", "PyTorch", "M activations", "peak MB"):
        table.add_column(title, justify="right")
    for row in rows:
        name = row["module"].rpartition(".")[2] or row["kind"]
        table.add_row(
            "  " * row["level"] + name,
            f"{row['parameters']:,}",
            *(f"{row[key] / 1e9:.3f}" for key in ("macs", "macs_for_loop", "macs_torch")),
            f"{row['activations'] / 1e6:.3f}",
            f"{row['peak_memory'] / 1e6:.1f}",
        )
    Console().print(table)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of equal keys as CSV."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Write tensors as a compressed .npz, by name."""
    values: dict[str, Any] = {name: tensor.numpy() for name, tensor in arrays.items()}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **values)
