"""The contract between a task and the training loop.

A task defines its recipe, its data, its loss and its metrics. The loop, the run's folder, checkpoints and the
command are the same for all tasks. To add one, write a module in
`vmamba/train/tasks/` with a subclass of `Task`, and name it in the table of `vmamba/train/tasks/__init__.py`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from vmamba.data import Preprocessing, SampleKey
from vmamba.errors import RecipeError
from vmamba.files import write_atomically
from vmamba.inference import Predictor
from vmamba.train.optim import Groups, parameter_groups
from vmamba.train.recipe import OptimRecipe, Recipe

Batch = Any
"""What `Task.collate` makes of a list of samples: any nesting of tuples, lists and dicts of tensors."""


class SampleDataset(Protocol):
    """What the loop needs of a dataset; samples may be anything that `Task.collate` accepts."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: SampleKey) -> Any:
        """A sample, augmented as a function of (seed, epoch, index).

        Raises:
            DataError: The sample cannot be read; with `train.on_error: skip` it is skipped.
        """

    def name(self, index: int) -> str:
        """A sample's name for messages."""


class Metrics(Protocol):
    """What `Task.metrics` returns, such as a `torchmetrics.Metric` or a `MetricCollection`.

    It must be a `torch.nn.Module`, so that it moves to the model's device, and `compute` must give the result
    over all processes, as torchmetrics' do. How to update it is up to the task's `validation_step`.
    """

    def compute(self) -> Mapping[str, Tensor]:
        """Results by name. Those of one value are scores, the others are tables for `Task.report`."""

    def reset(self) -> None: ...


@dataclass(frozen=True)
class SamplePrediction:
    """What was predicted for a sample of an evaluation.

    Attributes:
        index: The sample's index in the split "val".
        name: Its name, as the dataset gives it.
        value: The prediction, from `Task.report_step`.
    """

    index: int
    name: str
    value: Any


class Task(ABC):
    """One kind of problem.

    Args:
        recipe: An instance of the task's recipe type. The task keeps it, resolved, as `self.recipe`.
        classes: Names of the classes; default those of the data. A checkpoint gives them, so that a model can
            predict without its data.
    """

    name: ClassVar[str]
    """The value of a recipe's `task`."""
    recipe_type: ClassVar[type[Recipe]]
    monitor: ClassVar[str]
    """The score that chooses the best checkpoint: one of `metrics`, or "loss" for the validation loss."""
    monitor_mode: ClassVar[Literal["max", "min"]] = "max"
    """Whether a better score is higher or lower."""

    recipe: Any
    classes: list[str]
    preprocessing: Preprocessing
    """From an image file to the model's input, in evaluation."""
    category_ids: list[int] | None = None
    """The classes' numbers in annotation files, as predictions give them; a checkpoint keeps them."""
    needs_pairs: bool = False
    """`augment_batch` needs batches of an even size."""
    least_at_once: ClassVar[int] = 1
    """Fewest samples that the model trains on at a time: 2 where BatchNorm would see a single value."""
    eval_batch_size: ClassVar[int | None] = None
    """Samples of an evaluation batch; None for as many as in training. 1 where images are judged one by one
    at their full size, of which the workers would hold many."""

    @abstractmethod
    def __init__(self, recipe: Any, classes: Sequence[str] | None = None) -> None: ...

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        """Shape of one sample, from which the model's work is counted; None if it is not one tensor."""
        return None

    @classmethod
    def resolve(cls, recipe: Any) -> Any:
        """The recipe with what it leaves to the model (image size, mean, std, …) filled in.

        Resolving it again changes nothing. A run's recipe.yaml is the resolved one.
        """
        return recipe

    @classmethod
    def without_training_data(cls, recipe: Any) -> Any:
        """The recipe for a machine that has only the data of the split "val"."""
        return recipe

    @abstractmethod
    def dataset(self, split: Literal["train", "val"]) -> SampleDataset:
        """The samples of a split.

        Raises:
            DataError: The data are missing or damaged.
        """

    def collate(self) -> Callable[[list[Any]], Batch] | None:
        """How samples become a batch; None for PyTorch's default."""
        return None

    @abstractmethod
    def build_model(self, recipe: Any) -> nn.Module:
        """The model, with the weights that the recipe names."""

    def parameter_groups(self, model: nn.Module, optim: OptimRecipe) -> Groups:
        """The optimiser's parameter groups.

        Raises:
            RecipeError: The model has no layers for `optim.layer_decay`, or the task does not go with it.
        """
        return parameter_groups(model, optim)

    def warnings(self) -> list[str]:
        """What a user should know of the recipe before a training; it is logged."""
        return []

    def frozen(self, model: nn.Module) -> nn.Module:
        """What stays in evaluation mode while the model trains, where the recipe has `model.freeze`."""
        return model

    def augment_batch(self, batch: Batch) -> Batch:
        """Augment a training batch as a whole, on its device.

        A step may be computed in several batches, on several processes. All are augmented with the same
        random draws, and the samples 2i and 2i + 1 are always in the same batch. So an augmentation that uses
        only the draws and such pairs gives the same result on any number of processes.
        """
        return batch

    @abstractmethod
    def training_step(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Forward and losses of a training batch; "loss" is what is minimised, the others are shown."""

    @abstractmethod
    def metrics(self) -> Any:
        """New metrics of an evaluation during training, see `Metrics`."""

    def report_metrics(self) -> Any:
        """New metrics of a whole report, those of `metrics` among them."""
        return self.metrics()

    @abstractmethod
    def validation_step(self, model: nn.Module, batch: Batch, metrics: Any) -> Mapping[str, Tensor] | None:
        """Forward of an evaluation batch, into the metrics.

        Returns:
            Mean losses of the batch by name, logged as val/<name>; None if the task has none.
        """

    def report(self, results: Mapping[str, Tensor], folder: Path) -> None:
        """Write the tables among an evaluation's results as files, and as pictures where that helps.

        By default one JSON holds them all.
        """
        tables = {name: value.tolist() for name, value in results.items() if value.numel() != 1}
        if tables:
            text = json.dumps({"classes": list(self.classes), **tables})
            write_atomically(folder / "tables.json", text + "\n")

    def class_table(self, results: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """A row for each class, of plain values by column; the first column is "name".

        Args:
            results: Of `report_metrics`.

        Raises:
            RecipeError: The task has no results by class.
        """
        raise RecipeError(f"results by class: not for {self.name}")

    def report_step(
        self, model: nn.Module, batch: Batch, metrics: Any
    ) -> tuple[Mapping[str, Tensor] | None, Sequence[Any]]:
        """`validation_step` that also says what is predicted for each sample, for `report_predictions`.

        Returns:
            The losses, and a value for each sample of the batch, in order: it is held in memory until the
            evaluation ends, and pickled to reach the first process. By default none.
        """
        return self.validation_step(model, batch, metrics), ()

    def report_predictions(self, predictions: Sequence[SamplePrediction], folder: Path) -> None:
        """Write the predictions of `report_step`, if it returns any, as files.

        Args:
            predictions: One for each sample that could be read, in the dataset's order.
            folder: Of the other results.
        """
        raise NotImplementedError(f"{self.name}: report_step returns predictions that nothing writes")

    def averaged(self, model: nn.Module, flip: bool, scales: Sequence[float]) -> nn.Module:
        """The model with test-time augmentation.

        Raises:
            RecipeError: The task has none.
        """
        raise RecipeError(f"test-time augmentation: not for {self.name}")

    @abstractmethod
    def predictor(self, model: nn.Module) -> Predictor:
        """The predictor for a model, on the model's device."""


def scores(results: Mapping[str, Tensor]) -> dict[str, float]:
    """The single numbers among the results of metrics."""
    return {name: value.item() for name, value in results.items() if value.numel() == 1}
