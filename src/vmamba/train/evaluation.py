"""Judge weights by a task's whole protocol, and predict."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch.distributed
from torch import Tensor, nn

from vmamba.data import LoadedBatch, read_image
from vmamba.environment import environment
from vmamba.errors import CheckpointError, DataError, RecipeError
from vmamba.files import write_atomically
from vmamba.models.checkpoints import Weights, open_checkpoint, resolve_checkpoint
from vmamba.train.recipe import Recipe, check, override_values
from vmamba.train.run import load_recipe, loader, settings, trainer_for
from vmamba.train.task import Task, task_type


class _Judge(lightning.LightningModule):
    """Runs a task's whole set of metrics over the batches of an evaluation."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model, self.whole = task, model, task.report_metrics()
        self.samples = 0
        self.skipped: list[str] = []
        self.results: dict[str, Tensor] = {}

    def validation_step(self, loaded: LoadedBatch, batch_idx: int) -> None:
        self.task.evaluate(self.model, loaded.batch, self.whole)
        self.samples += len(loaded.indices)

    def on_validation_epoch_end(self) -> None:
        loader: Any = self.trainer.val_dataloaders
        found: list[Any] = [(self.samples, list(loader.skipped))]  # of each process
        if torch.distributed.is_initialized():
            found *= self.trainer.world_size
            torch.distributed.all_gather_object(found, found[0])
        self.samples = sum(samples for samples, _ in found)
        self.skipped = [message for _, messages in found for message in messages]
        if not self.samples:
            raise DataError(f"not one sample can be read, the first: {self.skipped[0]}")
        self.results = {name: value.detach().cpu() for name, value in self.whole.compute().items()}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        source: The checkpoint or recipe.
        task: Its name.
        weights: "raw" or "ema".
        flip: Whether mirror images were looked at too.
        scales: Sizes of the crop that were looked at.
        samples: Looked at.
        skipped: What was wrong with those left out.
        scores: The single numbers.
        tables: Further results of the task, by name.
        classes: Names.
    """

    source: str
    task: str
    weights: str
    flip: bool
    scales: list[float]
    samples: int
    skipped: list[str]
    scores: dict[str, float]
    tables: dict[str, Tensor]
    classes: list[str]


def load_run(
    checkpoint: str | Path, overrides: Sequence[str] = (), weights: Weights = "auto"
) -> tuple[Task, Recipe, nn.Module]:
    """The task, recipe and trained model that a checkpoint holds; nothing else is needed.

    Args:
        checkpoint: `checkpoints/best.ckpt` or `last.ckpt` of a run, or its folder, for the best.
        overrides: `section.key=value` each, laid over its recipe.
        weights: Which.

    Raises:
        CheckpointError: It is missing, damaged, not of a run, would run code, or has no such weights.
        RecipeError: An override does not fit.
    """
    task, recipe, model, _ = _open_run(checkpoint, overrides, weights)
    return task, recipe, model


def _open_run(
    place: str | Path, overrides: Sequence[str], weights: Weights
) -> tuple[Task, Recipe, nn.Module, str]:
    path = resolve_checkpoint(place)
    for override in overrides:
        if override.startswith(("model.", "model=")):
            raise RecipeError(
                f"override {override!r}: the model is that of {path}; to judge other weights give a recipe"
            )
    checkpoint = open_checkpoint(path)
    if checkpoint.recipe is None or checkpoint.classes is None:
        raise CheckpointError(f"{path}: not the checkpoint of a run, it has no recipe in it")
    values = override_values(dict(checkpoint.recipe), overrides)
    task_class = task_type(values.get("task"))
    recipe = check(task_class.recipe_type, values, str(path))
    task = task_class(recipe, checkpoint.classes)
    untrained = recipe.model.model_copy(update={"weights": None})  # the weights are in the checkpoint
    model = task.build_model(recipe.model_copy(update={"model": untrained}))
    try:
        model.load_state_dict(checkpoint.state_dict(weights))
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit its own model: {error}") from error
    return task, recipe, model.eval(), checkpoint.kind(weights)


def evaluate(
    what: str | Path,
    overrides: Sequence[str] = (),
    *,
    weights: Weights = "auto",
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
) -> Evaluation:
    """Judge weights on the "val" split of their recipe's data.

    Args:
        what: As `load_run`; or a recipe, whose `model.weights` are judged.
        overrides: `section.key=value` each, laid over the recipe.
        weights: Which of a checkpoint; "auto" leaves it to a recipe's `model.weights_kind`.
        flip: Average over mirror images too.
        scales: Average over these sizes of the crop.

    Raises:
        CheckpointError: As `load_run`.
        RecipeError: An override does not fit, the recipe names no weights, or a scale is not above 0 or too
            small for the model.
        DataError: The data are missing, damaged, or of other classes than the model.
        NonFiniteError: The model's outputs are not finite.
    """
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise RecipeError(f"scales: expected numbers above 0, got {list(scales)}")
    from_recipe = Path(what).suffix in (".yaml", ".yml")
    task, recipe, model, kind = (_open_recipe if from_recipe else _open_run)(what, overrides, weights)
    # Nothing is learnt: each process has the whole model.
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"strategy": "ddp"})})
    if flip or tuple(scales) != (1.0,):
        model = task.averaged(model, flip, scales)
    with settings(recipe):
        trainer = trainer_for(recipe, [])
        data = loader(task, recipe, "val", trainer)
        module = _Judge(task, model)
        trainer.validate(module, data, verbose=False)
    scores, tables = task.split_results(module.results)
    return Evaluation(
        source=str(what),
        task=task.name,
        weights=kind,
        flip=flip,
        scales=list(scales),
        samples=module.samples,
        skipped=module.skipped,
        scores=scores,
        tables=tables,
        classes=list(task.classes),
    )


def _open_recipe(
    path: str | Path, overrides: Sequence[str], weights: Weights
) -> tuple[Task, Recipe, nn.Module, str]:
    recipe: Any = load_recipe(path, overrides)
    task_class = task_type(recipe.task)
    if recipe.model.weights is None:
        raise RecipeError(
            f"{path}: names no weights to judge; set model.weights to 'pretrained' or a checkpoint's path"
        )
    source = recipe.model.weights
    kind = recipe.model.weights_kind if weights == "auto" else weights
    classes = None
    if source == "pretrained":
        if kind == "ema":
            raise RecipeError(f"{path}: there is no average of the pretrained weights; take those as trained")
    else:
        checkpoint = open_checkpoint(source)
        classes = checkpoint.classes  # the data have to have the same, in the same order
        kind = checkpoint.kind(kind)
    recipe = task_class.without_training_data(recipe)
    judged = recipe.model.model_copy(update={"weights_kind": kind, "new_classifier": False})
    task = task_class(recipe, classes)
    model = task.build_model(recipe.model_copy(update={"model": judged}))
    return task, recipe, model.eval(), "raw" if kind == "auto" else kind


def write_evaluation(found: Evaluation, folder: str | Path) -> None:
    """results.json, and the task's tables and pictures, into a folder."""
    folder = Path(folder)
    values = {
        **{"source": found.source, "weights": found.weights, "flip": found.flip, "scales": found.scales},
        **{"samples": found.samples, "skipped": found.skipped, "scores": found.scores},
        "environment": environment(),
    }
    write_atomically(folder / "results.json", json.dumps(values, indent=2) + "\n")
    task_type(found.task).write_tables(found.tables, found.classes, folder)


def predict(images: Sequence[str | Path], checkpoint: str | Path, weights: Weights = "auto") -> list[Any]:
    """A prediction for each image file; all are read before the model runs.

    Raises:
        DataError: A file is missing or no image; the message names it.
        CheckpointError: As `load_run`.
    """
    decoded: list[Any] = [read_image(path) for path in images]
    task, _, model = load_run(checkpoint, weights=weights)
    return [prediction for image in decoded for prediction in task.predict(model, [image])]
