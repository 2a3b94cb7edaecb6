"""The contract between a task and the training loop.

A task says what its recipe holds, where its data come from, what the loss is, and how it is judged; loop, run
folder, checkpoints and the command are the same for all. Add a task by subclassing `Task` and registering it.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import timm
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import MetricCollection

from vmamba.errors import CheckpointError, ModelError, RecipeError
from vmamba.files import write_atomically
from vmamba.models import factory
from vmamba.models.weights import load_weights
from vmamba.train.recipe import ModelRecipe, Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction(ABC):
    """What a task says of one image; `dataclasses.asdict` turns it into plain values."""

    @abstractmethod
    def text(self, top: int) -> str:
        """For a terminal, with the `top` likeliest findings."""


class Task(ABC):
    """One kind of problem.

    Args:
        recipe: Of the task's own type.
        classes: Names of the classes; default those of the data. A checkpoint gives them, so that a model can
            predict without its data.
    """

    name: ClassVar[str]
    recipe_type: ClassVar[type[Recipe]]
    monitor: ClassVar[str]
    """The metric of `metrics` by which the best checkpoint is chosen; higher is better."""

    @abstractmethod
    def __init__(self, recipe: Any, classes: Sequence[str] | None = None) -> None: ...

    classes: list[str]
    pairs = False
    """`mix` needs batches of an even size."""

    @abstractmethod
    def dataset(self, split: str) -> Dataset[Any]:
        """ "train" or "val", indexed by `vmamba.data.SampleKey`; its `name(index)` is for messages.

        Raises:
            DataError: The data are missing or damaged.
        """

    @abstractmethod
    def build_model(self, recipe: Any) -> nn.Module:
        """The model, with the weights that the recipe names."""

    def collate(self) -> Callable[[list[Any]], Any] | None:
        """How samples become a batch; None for PyTorch's default."""
        return None

    def mix(self, batch: Any) -> Any:
        """Augment a training batch as a whole, on its device.

        Every part of a step's batch is mixed with the same draws, and neighbours lie in the same part: what
        depends on these alone is the same on any number of processes.
        """
        return batch

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Forward and losses of a training batch; "loss" is what is minimised, the others are shown."""

    @abstractmethod
    def metrics(self) -> MetricCollection:
        """New metrics of an evaluation."""

    @classmethod
    def without_training_data(cls, recipe: Any) -> Any:
        """The recipe for where there are no data but those of the split "val"."""
        return recipe

    def report_metrics(self) -> MetricCollection:
        """New metrics of a whole report, those of `metrics` among them."""
        return self.metrics()

    def split_results(self, results: Mapping[str, Tensor]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Single numbers, and tables, of what `report_metrics` found."""
        numbers = {name: value.item() for name, value in results.items() if value.numel() == 1}
        return numbers, {name: value for name, value in results.items() if value.numel() != 1}

    @classmethod
    def write_tables(cls, tables: Mapping[str, Tensor], classes: Sequence[str], folder: Path) -> None:
        """Write the tables as files, and as pictures where that helps; by default as one JSON."""
        values = {"classes": list(classes), **{name: table.tolist() for name, table in tables.items()}}
        write_atomically(folder / "tables.json", json.dumps(values) + "\n")

    def averaged(self, model: nn.Module, flip: bool, scales: Sequence[float]) -> nn.Module:
        """The model with test-time augmentation.

        Raises:
            RecipeError: The task has none.
        """
        raise RecipeError(f"test-time augmentation: not for {self.name}")

    @abstractmethod
    def evaluate(self, model: nn.Module, batch: Any, metrics: MetricCollection) -> None:
        """Forward of an evaluation batch, into the metrics."""

    @abstractmethod
    def predict(self, model: nn.Module, images: Sequence[Image.Image]) -> list[Prediction]:
        """One prediction an image."""


TASKS: dict[str, type[Task]] = {}
"""Every task by its name in a recipe."""


def register_task(task: type[Task]) -> type[Task]:
    """Make a task known under its `name`; a class decorator."""
    TASKS[task.name] = task
    return task


def task_type(name: Any) -> type[Task]:
    """The task of a recipe's `task`.

    Raises:
        RecipeError: There is none of that name.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise RecipeError(f"task: unknown task {name!r}; expected one of {', '.join(map(repr, TASKS))}")
    return TASKS[name]


def create_model(recipe: ModelRecipe, **defaults: Any) -> nn.Module:
    """A model of timm's registry, by a recipe's section; its `args` win over `defaults`.

    Raises:
        RecipeError: The model or one of its arguments is unknown.
        CheckpointError: `weights` does not fit or cannot be read.
    """
    pretrained = recipe.weights == "pretrained"
    arguments = {**defaults, **recipe.args}
    try:
        factory.check_name(recipe.name)
    except ModelError as error:
        raise RecipeError(f"model.name: {error}") from error
    classes = arguments.get("num_classes")
    known = timm.get_pretrained_cfg(recipe.name) if pretrained else None
    learnt = classes if known is None or classes is None else known.num_classes
    if learnt != classes:
        arguments["num_classes"] = learnt  # given another number timm would let any weight be missing
    try:
        model = factory.create_model(recipe.name, pretrained=pretrained, **arguments)
    except ModelError as error:
        raise RecipeError(f"model.args: {error}") from error
    if learnt != classes:
        differ = (
            f"{recipe.name}: the pretrained classifier is for {learnt} classes, the model's for {classes}"
        )
        if not recipe.new_classifier:
            raise CheckpointError(differ)
        log.warning("%s: it starts anew", differ)
        model.reset_classifier(classes)
    if recipe.weights is not None and not pretrained:
        report = load_weights(
            model,
            recipe.weights,
            classifier="new" if recipe.new_classifier else "keep",
            weights=recipe.weights_kind,
        )
        (log.warning if report.missing else log.info)("%s", report)
    if recipe.freeze == "backbone":
        model.eval().requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model
