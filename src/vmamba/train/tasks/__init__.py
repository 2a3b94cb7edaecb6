"""The tasks, one module each, imported when a recipe names it."""

import importlib
from typing import Any

import torch
from torch import nn

from vmamba.errors import CheckpointError, ModelError, RecipeError
from vmamba.inference import Predictor
from vmamba.models.checkpoints import Checkpoint, Weights
from vmamba.train.recipe import check
from vmamba.train.task import Task

TASKS = {
    "classification": "vmamba.train.tasks.classification:ClassificationTask",
    "detection": "vmamba.train.tasks.detection:DetectionTask",
    "segmentation": "vmamba.train.tasks.segmentation:SegmentationTask",
}
"""Module and class of every task, by its name in a recipe."""


def task_type(name: Any) -> type[Task]:
    """The task of a recipe's `task`.

    Raises:
        RecipeError: There is none of that name.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise RecipeError(f"task: unknown task {name!r}; expected one of {', '.join(map(repr, TASKS))}")
    module, _, class_name = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)


def restore_task(recipe: Any, checkpoint: Checkpoint) -> Task:
    """The task of a recipe, with the classes that a checkpoint was trained for.

    Raises:
        DataError: The checkpoint does not name its classes, and the recipe's data are missing or damaged.
    """
    task = task_type(recipe.task)(recipe, checkpoint.classes)
    if checkpoint.category_ids is not None:
        task.category_ids = checkpoint.category_ids
    return task


def restore_model(task: Task, checkpoint: Checkpoint, weights: Weights, *, trained: bool = True) -> nn.Module:
    """Rebuild the trained model of a task.

    Args:
        task: Of the checkpoint's recipe, in which sections other than `model` may have been changed.
        checkpoint: A run's.
        weights: Which of the checkpoint's weights to load.
        trained: False leaves the weights as the architecture draws them.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: It has no such weights, or they do not fit its model.
    """
    recipe = task.recipe
    untrained = recipe.model.model_copy(update={"weights": None})  # the weights are in the checkpoint
    model = task.build_model(recipe.model_copy(update={"model": untrained}))
    if not trained:
        return model.eval()
    try:
        model.load_state_dict(checkpoint.state_dict(weights))
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint.path}: does not fit its own model: {error}") from error
    return model.eval()


def load_predictor(
    checkpoint: Checkpoint,
    weights: Weights = "auto",
    *,
    model: str | None = None,
    trained: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Predictor:
    """The predictor of a run of any task, for `vmamba.load`.

    Args:
        checkpoint: A run's.
        weights: Which of the checkpoint's weights to load.
        model: The backbone's name, if the caller gives one.
        trained: False leaves the weights as the architecture draws them.
        device: As PyTorch names it.
        dtype: A floating type.

    Raises:
        CheckpointError: The file is not of a run, has no such weights, or does not fit.
        ModelError: The run's backbone is not `model`.
    """
    values = dict(checkpoint.recipe or (checkpoint.config or {}).get("vmamba", {}).get("recipe") or {})
    if not values:
        raise CheckpointError(f"{checkpoint.path}: does not say by what recipe its model is made")
    recipe = check(task_type(values.get("task")).recipe_type, values, checkpoint.path)
    backbone = recipe.model.name
    if model is not None and model.partition(".")[0] != backbone.partition(".")[0]:
        raise ModelError(f"model: the backbone of {checkpoint.path} is {backbone}, not {model}")
    task = restore_task(recipe, checkpoint)
    network = restore_model(task, checkpoint, weights, trained=trained)
    return task.predictor(network.to(device=device, dtype=dtype))
