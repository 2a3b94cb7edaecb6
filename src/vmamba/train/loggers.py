"""Loggers of the training curves besides metrics.csv."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from vmamba.errors import RecipeError
from vmamba.train.recipe import Recipe

log = logging.getLogger(__name__)


class _Events(TensorBoardLogger):
    """TensorBoard's events. If they cannot be written, as on a full disk, the run continues without them."""

    _failed = False

    def _try(self, write: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        try:
            write(*args)
        except OSError as error:
            self._failed = True
            log.warning("%s: TensorBoard's events cannot be written (%s)", self.log_dir, error)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._try(super().log_metrics, metrics, step)

    def save(self) -> None:
        self._try(super().save)

    def finalize(self, status: str) -> None:
        self._try(super().finalize, status)


def loggers_for(recipe: Recipe, folder: Path) -> list[Logger]:
    """TensorBoard, and what the recipe names.

    Raises:
        RecipeError: A package is not installed.
    """
    loggers: list[Logger] = [_Events(folder, name="tensorboard", version="")]
    values = recipe.model_dump(mode="json")
    for name in recipe.train.loggers:
        try:
            if name == "wandb":
                loggers.append(WandbLogger(name=folder.name, save_dir=folder, config=values))
            else:
                mlflow = MLFlowLogger(experiment_name="vmamba", run_name=folder.name)
                mlflow.log_hyperparams(values)
                loggers.append(mlflow)
        except ModuleNotFoundError as error:
            raise RecipeError(f"train.loggers: {name} is not installed; pip install {name}") from error
    return loggers
