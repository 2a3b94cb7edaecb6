"""Read what runs and their evaluations wrote."""

import json
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, TypeVar

import torch

from vmamba.analysis.complexity import count
from vmamba.errors import DataError, UserError
from vmamba.models.checkpoints import read_config, run_folder, runs_hint
from vmamba.train.curves import read_metrics
from vmamba.train.recipe import Recipe, check, read_values
from vmamba.train.runs import Run, read_run
from vmamba.train.tasks import task_type

log = logging.getLogger(__name__)

RESULTS = "results.json"
"""The file by which a folder is known as an evaluation."""


@dataclass(frozen=True)
class Judgement:
    """An evaluation, as `vmamba eval --out` wrote it.

    Attributes:
        folder: With results.json, tables and pictures.
        source: What was evaluated, as the user named it then.
        weights: "raw" or "ema".
        averaged: Whether predictions were averaged over mirror images or sizes.
        samples: How many were evaluated.
        skipped: For each sample that could not be read, why.
        scores: By name.
        date: In ISO 8601.
        command: That made it.
    """

    folder: Path
    source: str
    weights: str
    averaged: bool
    samples: int
    skipped: list[str]
    scores: dict[str, float]
    date: str
    command: str


@dataclass(frozen=True)
class RunRecord:
    """All that the folder of a run says, and the evaluations of it.

    Attributes:
        folder: Of the run.
        run: In short.
        recipe: Resolved, as the run used it.
        rows: Of metrics.csv: numbers by column.
        environment: Of env.json.
        history: Of history.jsonl: when the run was started and resumed, by which command and with what
            changes.
        classes: Their names; None before the first evaluation.
        parameters: Of the model; None if they cannot be counted.
        macs: Multiply-adds, by the paper's counting; None also where the task's inputs differ in size.
        input_size: The (channels, height, width) that the multiply-adds are of.
        judgements: The newest last.
    """

    folder: Path
    run: Run
    recipe: Recipe
    rows: list[dict[str, float]]
    environment: dict[str, Any]
    history: list[dict[str, Any]]
    classes: list[str] | None
    parameters: int | None
    macs: float | None
    input_size: tuple[int, ...] | None
    judgements: list[Judgement] = field(default_factory=list)

    @property
    def task(self) -> str:
        """The task's name."""
        return self.recipe.task


def read_records(runs: Sequence[str | Path], evaluations: Sequence[str | Path] = ()) -> list[RunRecord]:
    """Read runs, with the evaluations given and those that lie in their folders or beside them.

    Args:
        runs: Folders of runs; their `checkpoints` or a file in either will do.
        evaluations: Folders that `vmamba eval --out` wrote, of any of the runs.

    Raises:
        MissingCheckpointError: There is nothing at a path of `runs`.
        DataError: A folder is not a run or not an evaluation, is damaged, or an evaluation is of another run.
    """
    folders = list({folder.resolve(): folder for folder in map(run_folder, runs)}.values())
    names = [folder.resolve().name for folder in folders]
    records = [
        _read_record(folder, name if names.count(name) == 1 else str(folder))
        for folder, name in zip(folders, names, strict=True)
    ]
    for record in records:
        for place in _beside(record.folder.resolve()):
            judgement = _recognised(place)
            if judgement is not None and _is_of(judgement.source, record.folder):
                record.judgements.append(judgement)
    for evaluation in evaluations:
        judgement = read_judgement(Path(evaluation).expanduser())
        judged = _judged_record(judgement, records).judgements
        if judgement.folder.resolve() not in [each.folder.resolve() for each in judged]:
            judged.append(judgement)
    for record in records:
        record.judgements.sort(key=lambda each: each.date)
    return records


def _read_record(folder: Path, name: str) -> RunRecord:
    try:
        run = read_run(folder, name)
    except DataError as error:
        raise DataError(f"{error}{runs_hint(folder)}") from None
    values, _ = read_values(folder / "recipe.yaml")
    recipe = check(task_type(values.get("task")).recipe_type, values, str(folder / "recipe.yaml"))
    classes = (read_config(folder / "config.json") or {}).get("label_names")
    parameters, macs, input_size = _counted(recipe, classes)
    history = folder / "history.jsonl"
    return RunRecord(
        folder=folder,
        run=run,
        recipe=recipe,
        rows=_numbers(folder / "metrics.csv"),
        environment=_read(folder / "env.json", _mapping),
        history=_read(history, _mappings) if history.exists() else [],
        classes=classes,
        parameters=parameters,
        macs=macs,
        input_size=input_size,
    )


def _counted(
    recipe: Any, classes: Sequence[str] | None
) -> tuple[int | None, float | None, tuple[int, ...] | None]:
    """Parameters and multiply-adds of the run's model, and for which input; nothing is computed or loaded."""
    if classes is None:
        return None, None, None
    model_recipe = recipe.model.model_copy(update={"weights": None})
    recipe = recipe.model_copy(update={"model": model_recipe})
    try:
        task = task_type(recipe.task)(recipe, classes)
        with torch.device("meta"):
            model = task.build_model(task.recipe)
        if task.sample_shape is not None:
            counts = count(model, task.sample_shape)
            return counts.parameters, counts.macs, task.sample_shape
    except UserError as error:  # such as a model of another package, which is not imported here
        log.warning("the model is not counted: %s", error)
        return None, None, None
    return sum(parameter.numel() for parameter in model.parameters()), None, None


def _numbers(path: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv; empty cells are left out.

    Raises:
        DataError: A cell is not a number.
    """
    rows = []
    for number, row in enumerate(read_metrics(path), 2):
        try:
            values = {name: float(value) for name, value in row.items() if value}
            rows.append({"epoch": values.pop("epoch"), "step": values.pop("step"), **values})
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}, line {number}: expected a number in every cell ({error})") from None
    return rows


T = TypeVar("T")


def _read(path: Path, parse: Callable[[str], T]) -> T:
    """A parsed text file.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # of JSON, and of bytes that are not text
        raise DataError(f"{path}: damaged ({error})") from None


def _mapping(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"expected a mapping, got {type(values).__name__}")
    return values


def _mappings(text: str) -> list[dict[str, Any]]:
    return [_mapping(line) for line in text.splitlines()]


def read_judgement(folder: Path) -> Judgement:
    """An evaluation that `vmamba eval --out` wrote into a folder.

    Raises:
        DataError: It is not one, or its results.json is damaged.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise DataError(f"{folder}: no evaluation, it has no {RESULTS}; `vmamba eval RUN --out` writes one")
    values = _read(path, _mapping)
    try:
        environment = values["environment"]
        return Judgement(
            folder=folder,
            source=str(values["source"]),
            weights=str(values["weights"]),
            averaged=bool(values["flip"]) or list(values["scales"]) != [1.0],
            samples=int(values["samples"]),
            skipped=list(map(str, values["skipped"])),
            scores={str(name): float(value) for name, value in values["scores"].items()},
            date=str(environment["date"]),
            command=shlex.join(environment["command"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not the results of `vmamba eval`, or damaged ones ({error!r})") from None


def _beside(run: Path) -> list[Path]:
    """Folders in a run and beside it that may be evaluations."""
    patterns = (f"*/{RESULTS}", f"*/*/{RESULTS}")
    return sorted(
        {path.parent for place in (run, run.parent) for each in patterns for path in place.glob(each)}
    )


def _recognised(folder: Path) -> Judgement | None:
    """The evaluation in a folder; None for results of another kind, such as a benchmark's."""
    try:
        return read_judgement(folder)
    except DataError:
        return None


def _judged_record(judgement: Judgement, records: Sequence[RunRecord]) -> RunRecord:
    matching = [record for record in records if _is_of(judgement.source, record.folder)]
    if len(matching) != 1:
        which = "none" if not matching else "more than one"
        raise DataError(
            f"{judgement.folder}: an evaluation of {judgement.source}, which is {which} of the runs given: "
            f"{', '.join(str(record.folder) for record in records)}"
        )
    return matching[0]


def _is_of(source: str, run: Path) -> bool:
    """Whether an evaluation's source is this run.

    A relative path counts from a folder that is not known: it is enough that the run's path ends with it.
    """
    path = PurePath(source)
    if path.suffix in (".ckpt", ".safetensors", ".yaml"):
        path = path.parent
    if path.name == "checkpoints":
        path = path.parent
    if Path(path).resolve() == run.resolve():
        return True
    relative = path.parts and not path.is_absolute() and ".." not in path.parts
    return bool(relative) and run.resolve().parts[-len(path.parts) :] == path.parts
