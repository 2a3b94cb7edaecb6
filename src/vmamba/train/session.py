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
from vmamba.train.task import SampleDataset, Task
from vmamba.train.tasks import restore_model, restore_task, task_type

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
        samples: Those of the split "val", if `open_session` was to open them.
    """

    source: str
    task: Task
    recipe: Any
    model: nn.Module
    weights: Literal["raw", "ema", "new"]
    samples: SampleDataset | None = None

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
    for warning in task.warnings():
        log.warning("%s", warning)
    with seeded("initialisation", recipe.train.seed):
        model = task.build_model(task.recipe)
    if recipe.train.grad_checkpointing:
        enable_grad_checkpointing(model)
    return Session(source, task, task.recipe, model, "new")


def open_session(
    source: str | Path,
    overrides: Sequence[str] = (),
    weights: Weights = "auto",
    *,
    with_samples: bool = False,
) -> Session:
    """The task, the recipe and the trained model that a run holds or a recipe names.

    Args:
        source: A run's folder (its best checkpoint), a checkpoint or best.safetensors of a run, or a recipe
            with `model.weights`.
        overrides: `section.key=value` each, laid over the recipe.
        weights: Which of a run's; "auto" takes the average where there is one, and leaves it to a recipe's
            `model.weights_kind`.
        with_samples: Open the split "val" too, before the model is built, which takes longer than to see that
            data are missing.

    Raises:
        CheckpointError: It is missing, damaged, not of a run, would run code, or has no such weights.
        RecipeError: An override does not fit, or a recipe names no weights.
        DataError: The data are missing.
    """
    path = expand(source)
    # A run's recipe.yaml stands for the run, not for the `model.weights` that it started from.
    if path.suffix in (".yaml", ".yml") and not (path.parent / "checkpoints").is_dir():
        return _open_recipe(path, overrides, weights, with_samples)
    return _open_run(source, overrides, weights, with_samples)


def _open_run(source: str | Path, overrides: Sequence[str], weights: Weights, with_samples: bool) -> Session:
    path = resolve_checkpoint(source)
    for override in overrides:
        if override.startswith(("model.", "model=")):
            raise RecipeError(
                f"override {override!r}: the model is that of {path}; to judge other weights give a recipe"
            )
    checkpoint = open_checkpoint(path)
    recipe_values = _recipe_of(checkpoint)
    recipe_type = task_type(recipe_values.get("task")).recipe_type
    recipe: Any = check(recipe_type, override_values(recipe_values, overrides, recipe_type), str(path))
    kind: Any = checkpoint.kind(weights)
    task = restore_task(recipe, checkpoint)
    samples = task.dataset("val") if with_samples else None
    return Session(str(source), task, task.recipe, restore_model(task, checkpoint, weights), kind, samples)


def _recipe_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The recipe in a run's checkpoint, or beside a run's best.safetensors.

    Raises:
        CheckpointError: There is none.
    """
    if checkpoint.recipe is not None:
        return dict(checkpoint.recipe)
    beside = Path(checkpoint.path).with_name("recipe.yaml")
    if checkpoint.config is not None and beside.is_file():
        return read_values(beside)[0]
    raise CheckpointError(
        f"{checkpoint.path}: not the checkpoint of a run, it has no recipe in it; to judge its weights give "
        f"the recipe of the data too: vmamba eval RECIPE.yaml model.weights={checkpoint.path}"
    )


def _open_recipe(path: Path, overrides: Sequence[str], weights: Weights, with_samples: bool) -> Session:
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
    section = recipe.model.model_copy(update={"weights_kind": kind, "new_classifier": False})
    of_val = task_class.without_training_data(recipe)
    # If the file of weights names its classes, the data must have the same.
    task = task_class(of_val) if checkpoint is None else restore_task(of_val, checkpoint)
    samples = task.dataset("val") if with_samples else None
    model = task.build_model(task.recipe.model_copy(update={"model": section})).eval()
    return Session(str(path), task, task.recipe, model, "raw" if kind == "auto" else kind, samples)
