"""A task with its recipe and its model, from which training, evaluation and benchmarks start."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from vmamba.data import seeded
from vmamba.errors import CheckpointError, RecipeError
from vmamba.inference import Predictor
from vmamba.models.checkpoints import Checkpoint, Weights, expand, open_checkpoint, resolve_checkpoint
from vmamba.train.optim import enable_grad_checkpointing
from vmamba.train.recipe import Recipe, check, override_values, read_values
from vmamba.train.task import Task
from vmamba.train.tasks import restore, task_type

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A task and a model, ready for training, evaluation or prediction.

    Attributes:
        source: The run, checkpoint or recipe that it comes from.
        task: The task, with its data.
        recipe: The task's recipe, resolved.
        model: The model, in evaluation mode unless it is to be trained.
        weights: "raw" or "ema"; "new" before training.
    """

    source: str
    task: Task
    recipe: Any
    model: nn.Module
    weights: Literal["raw", "ema", "new"]

    def predictor(self) -> Predictor:
        """The predictor for this task and model."""
        return self.task.predictor(self.model)


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: A YAML file.
        overrides: `section.key=value` each, laid over it.

    Raises:
        RecipeError: Something in it is missing, unknown or of the wrong type; the message names each.
    """
    values, lines = read_values(expand(source))
    for override in overrides:  # messages about its key must not name a line of the file
        name, _, value = override.partition("=")
        if name == "task":
            values["task"] = value
        lines.pop(name, None)
    recipe_type = task_type(values.get("task")).recipe_type
    return check(recipe_type, override_values(values, overrides, recipe_type), str(source), lines)


def training_session(recipe: Recipe, source: str = "recipe") -> Session:
    """The task and the model that a recipe trains, before its first step.

    Raises:
        RecipeError: The recipe does not fit the model.
        DataError: The data are missing or damaged.
        CheckpointError: The weights to start from do not fit or cannot be read.
    """
    task = task_type(recipe.task)(recipe)
    with seeded("initialisation", recipe.train.seed):
        model = task.build_model(task.recipe)
    if recipe.train.grad_checkpointing:
        enable_grad_checkpointing(model)
    return Session(source, task, task.recipe, model, "new")


def open_session(source: str | Path, overrides: Sequence[str] = (), weights: Weights = "auto") -> Session:
    """The task, the recipe and the trained model that a run holds or a recipe names.

    Args:
        source: A run's folder (its best checkpoint), a checkpoint, or a recipe with `model.weights`.
        overrides: `section.key=value` each, laid over the recipe.
        weights: Which of a run's; "auto" takes the average where there is one, and leaves it to a recipe's
            `model.weights_kind`.

    Raises:
        CheckpointError: It is missing, damaged, not of a run, would run code, or has no such weights.
        RecipeError: An override does not fit, or a recipe names no weights.
        DataError: A recipe's data are missing.
    """
    path = expand(source)
    # A run's recipe.yaml stands for the run, not for the `model.weights` that it started from.
    if path.suffix in (".yaml", ".yml") and not (path.parent / "checkpoints").is_dir():
        return _open_recipe(path, overrides, weights)
    return _open_run(source, overrides, weights)


def _open_run(source: str | Path, overrides: Sequence[str], weights: Weights) -> Session:
    path = resolve_checkpoint(source)
    for override in overrides:
        if override.startswith(("model.", "model=")):
            raise RecipeError(
                f"override {override!r}: the model is that of {path}; to judge other weights give a recipe"
            )
    checkpoint = open_checkpoint(path)
    if checkpoint.recipe is None:
        raise CheckpointError(f"{path}: not the checkpoint of a run, it has no recipe in it")
    recipe_type = task_type(checkpoint.recipe.get("task")).recipe_type
    values = override_values(dict(checkpoint.recipe), overrides, recipe_type)
    task, model = restore(checkpoint, check(recipe_type, values, str(path)), weights)
    kind: Any = checkpoint.kind(weights)
    return Session(str(source), task, task.recipe, model, kind)


def _open_recipe(path: Path, overrides: Sequence[str], weights: Weights) -> Session:
    recipe: Any = load_recipe(path, overrides)
    task_class = task_type(recipe.task)
    if recipe.model.weights is None:
        raise RecipeError(
            f"{path}: names no weights to judge; set model.weights to 'pretrained' or a checkpoint's path"
        )
    kind: Any = recipe.model.weights_kind if weights == "auto" else weights
    checkpoint: Checkpoint | None = None
    if recipe.model.weights != "pretrained":
        checkpoint = open_checkpoint(recipe.model.weights)
        kind = checkpoint.kind(kind)
    elif kind == "ema":
        raise RecipeError(f"{path}: there is no average of the pretrained weights; take those as trained")
    # If the file of weights names its classes, the data must have the same.
    classes = None if checkpoint is None else checkpoint.classes
    section = recipe.model.model_copy(update={"weights_kind": kind, "new_classifier": False})
    task = task_class(task_class.without_training_data(recipe), classes)
    model = task.build_model(task.recipe.model_copy(update={"model": section}))
    return Session(str(path), task, task.recipe, model.eval(), "raw" if kind == "auto" else kind)
