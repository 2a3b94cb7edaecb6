"""The tasks, one module each, which is imported when a recipe asks for it."""

import importlib
from typing import Any

from vmamba.errors import RecipeError
from vmamba.train.task import Task

TASKS = {
    "classification": "vmamba.train.tasks.classification:ClassificationTask",
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
