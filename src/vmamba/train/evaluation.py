"""Evaluate weights by a task's full protocol."""

import json
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from vmamba.data import LoadedBatch
from vmamba.environment import environment
from vmamba.errors import DataError, OutputError, RecipeError
from vmamba.files import write_atomically
from vmamba.models.checkpoints import Weights
from vmamba.train.guard import NonFiniteError
from vmamba.train.loaders import loader
from vmamba.train.means import RunningMeans, gather
from vmamba.train.progress import ProgressLine
from vmamba.train.session import open_session
from vmamba.train.task import SamplePrediction, Task, scores
from vmamba.train.trainer import settings, trainer_for

log = logging.getLogger(__name__)


class _Judge(lightning.LightningModule):
    """Computes all of a task's metrics over the batches of an evaluation."""

    def __init__(self, task: Task, model: nn.Module, keep_predictions: bool) -> None:
        super().__init__()
        self.keep_predictions = keep_predictions
        self.predictions: list[tuple[int, Any]] = []
        self.task, self.model, self.metrics = task, model, task.report_metrics()
        self.means = RunningMeans()
        self.samples = 0
        self.skipped: list[str] = []
        self.results: dict[str, Tensor] = {}

    def validation_step(self, loaded: LoadedBatch, batch_idx: int) -> None:
        if self.keep_predictions:
            losses, predicted = self.task.report_step(self.model, loaded.batch, self.metrics)
            if predicted:
                self.predictions += zip(loaded.indices, predicted, strict=True)
        else:
            losses = self.task.validation_step(self.model, loaded.batch, self.metrics)
        self.means.add(losses or {}, len(loaded.indices))
        self.samples += len(loaded.indices)

    def on_validation_epoch_end(self) -> None:
        loader: Any = self.trainer.val_dataloaders
        per_process = gather((self.samples, list(loader.skipped), self.predictions))
        self.samples = sum(samples for samples, _, _ in per_process)
        self.skipped = [message for _, messages, _ in per_process for message in messages]
        predictions = (pair for _, _, pairs in per_process for pair in pairs)
        self.predictions = sorted(predictions, key=lambda pair: pair[0])
        if not self.samples:
            raise DataError(f"not one sample can be read, the first: {self.skipped[0]}")
        means = self.means.means()
        if not all(map(math.isfinite, means.values())):
            raise NonFiniteError("the model's outputs are not finite; judge it with train.precision=32-true")
        self.results = {name: torch.tensor(value) for name, value in means.items()}
        self.results |= {name: value.detach().cpu() for name, value in self.metrics.compute().items()}


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        source: The checkpoint or recipe.
        task: The task of `source`.
        weights: "raw" or "ema".
        flip: Whether predictions were averaged over mirror images too.
        scales: Sizes of the crop that predictions were averaged over.
        samples: How many samples were evaluated.
        skipped: For each skipped sample, what was wrong with it.
        results: The task's metrics and losses by name: single numbers and tables.
        predictions: What was predicted for each sample, in the dataset's order; see `Task.report_step`. Empty
            if that was not asked for.
    """

    source: str
    task: Task
    weights: str
    flip: bool
    scales: list[float]
    samples: int
    skipped: list[str]
    results: Mapping[str, Tensor]
    predictions: Sequence[SamplePrediction] = ()

    @property
    def scores(self) -> dict[str, float]:
        """The single numbers."""
        return scores(self.results)

    @property
    def tables(self) -> dict[str, Tensor]:
        """The results that are not single numbers."""
        return {name: value for name, value in self.results.items() if value.numel() != 1}

    @property
    def class_table(self) -> list[dict[str, Any]]:
        """A row for each class; see `Task.class_table`."""
        return self.task.class_table(self.results)

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return list(self.task.classes)


def evaluate(
    what: str | Path,
    overrides: Sequence[str] = (),
    *,
    weights: Weights = "auto",
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    keep_predictions: bool = False,
) -> Evaluation:
    """Evaluate weights on the "val" split of their recipe's data.

    Args:
        what: A run, a checkpoint or best.safetensors of it, or a recipe whose `model.weights` to evaluate;
            see `open_session`.
        overrides: `section.key=value` each, laid over the recipe.
        weights: Which of a checkpoint; "auto" leaves it to a recipe's `model.weights_kind`.
        flip: Average over mirror images too.
        scales: Average over views of these sizes, as factors of the recipe's.
        keep_predictions: Keep what is predicted for each sample, for `Evaluation.predictions`.

    Raises:
        CheckpointError: As `open_session`.
        RecipeError: An override does not fit, the recipe names no weights, or a scale is not above 0 or too
            small for the model.
        DataError: The data are missing, damaged, or of other classes than the model.
        NonFiniteError: The model's outputs are not finite.
    """
    if not scales or not all(0 < scale < math.inf for scale in scales):
        raise RecipeError(f"scales: expected numbers above 0, got {list(scales)}")
    session = open_session(what, overrides, weights, with_samples=True)
    recipe, model = session.recipe, session.model
    # Without training nothing needs sharding: each process holds the whole model.
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"strategy": "ddp"})})
    if flip or tuple(scales) != (1.0,):
        model = session.task.averaged(model, flip, scales)
    with settings(recipe):
        trainer = trainer_for(recipe, [ProgressLine()])
        data = loader(session.task, recipe, "val", trainer, session.samples)
        module = _Judge(session.task, model, keep_predictions)
        with closing(data):
            trainer.validate(module, data, verbose=False)
    for message in module.skipped:
        log.warning("left out: %s", message)
    return Evaluation(
        source=str(what),
        task=session.task,
        weights=session.weights,
        flip=flip,
        scales=list(scales),
        samples=module.samples,
        skipped=module.skipped,
        results=module.results,
        predictions=[
            SamplePrediction(index, data.samples.name(index), value) for index, value in module.predictions
        ],
    )


def check_folder(folder: str | Path) -> None:
    """Make the folder for results, before the evaluation, so that a failure costs no work.

    Raises:
        OutputError: It cannot be made or written to, or a folder has a name that a file may need.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # it has no name that several processes could share
            pass
        entries = list(folder.iterdir())
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to ({error.strerror or error})") from error
    for entry in entries:  # which files a task writes is known only when it is loaded
        if entry.suffix in (".json", ".csv", ".png") and entry.is_dir():
            raise OutputError(f"{entry}: a folder, where a file of results may be written; move it away")


def write_evaluation(evaluation: Evaluation, folder: str | Path) -> None:
    """Write results.json, and the task's tables, pictures and predictions, into a folder.

    Raises:
        OutputError: A file cannot be written.
    """
    folder = Path(folder)
    values = {
        "source": evaluation.source,
        "weights": evaluation.weights,
        "flip": evaluation.flip,
        "scales": evaluation.scales,
        "samples": evaluation.samples,
        "skipped": evaluation.skipped,
        "scores": evaluation.scores,
        "environment": environment(),
    }
    try:
        write_atomically(folder / "results.json", json.dumps(values, indent=2) + "\n")
        evaluation.task.report(evaluation.results, folder)
        if evaluation.predictions:
            evaluation.task.report_predictions(evaluation.predictions, folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to ({error.strerror or error})") from error
