"""Train, evaluate and predict: what the command's verbs do."""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from vmamba.data import EpochSampler, ResumableLoader, read_image, seeded
from vmamba.environment import environment
from vmamba.errors import CheckpointError, DataError, RecipeError
from vmamba.train import classification  # noqa: F401  (registers its task)
from vmamba.train.callbacks import (
    Checkpoints,
    MetricsFile,
    ProgressLine,
    StopOnInterrupt,
    Throughput,
)
from vmamba.train.checkpoint import (
    AtomicCheckpointIO,
    contents,
    load_checkpoint,
    model_weights,
    write_atomically,
)
from vmamba.train.module import TaskModule
from vmamba.train.recipe import Recipe, check, override_values, read_values
from vmamba.train.task import Task, task_type

_NOISE = [
    ".*does not have many workers.*",  # for small sets none is fastest
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",  # Lightning's use of PyTorch
]
"""Warnings of Lightning that say nothing to the user."""


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: A YAML file.
        overrides: `section.key=value` each, laid over it.

    Raises:
        RecipeError: Something in it is missing, unknown or of the wrong type; the message names each.
    """
    values, lines = read_values(source)
    values = override_values(values, overrides)
    for override in overrides:  # what it says stands on no line of the file
        lines.pop(override.partition("=")[0], None)
    return check(task_type(values.get("task")).recipe_type, values, str(source), lines)


def train(recipe: Recipe, folder: str | Path, *, resume: bool = False) -> dict[str, float]:
    """Run a recipe.

    Args:
        recipe: From `load_recipe`.
        folder: Of the run: recipe.yaml, env.json, metrics.csv, curves.png, checkpoints/best.ckpt and
            last.ckpt.
        resume: Go on from the folder's last.ckpt.

    Returns:
        The metrics of the last evaluation.

    Raises:
        RecipeError: The folder holds a run already and `resume` is not set.
        DataError: The data are missing or damaged.
        CheckpointError: There is nothing to resume, or it is damaged.
        Interrupted: Ctrl-C was pressed; last.ckpt is written.
    """
    folder = Path(folder)
    last = folder / "checkpoints" / "last.ckpt"
    if not resume and last.exists():
        raise RecipeError(f"{folder}: holds a run already; resume it with --resume, or name another folder")
    with _settings(recipe):
        task = task_type(recipe.task)(recipe)
        checkpoints, interrupt = Checkpoints(folder, f"val/{task.monitor}"), StopOnInterrupt(folder)
        trainer = _trainer(
            recipe,
            [
                Throughput(),
                MetricsFile(folder),
                checkpoints,  # behind the row of the epoch
                interrupt,  # behind its checkpoint
            ],
        )
        training, validation = (_loader(task, recipe, split, trainer) for split in ("train", "val"))
        with seeded("initialisation", recipe.train.seed):
            model: Any = task.build_model(recipe)
        if recipe.train.grad_checkpointing:
            model.set_grad_checkpointing(True)
        if trainer.is_global_zero:
            write_atomically(folder / "recipe.yaml", recipe.to_yaml())
            found = {**environment(), "lightning": lightning.__version__}
            write_atomically(folder / "env.json", json.dumps(found, indent=2) + "\n")
        module = TaskModule(task, recipe, model, steps=recipe.schedule.epochs * len(training))
        with interrupt.listening():
            trainer.fit(module, training, validation, ckpt_path=last if resume else None)
    return checkpoints.scores


def resume(folder: str | Path) -> dict[str, float]:
    """Go on with the run in a folder from its last.ckpt, by the recipe in it; see `train`."""
    last = Path(folder) / "checkpoints" / "last.ckpt"
    values, _ = contents(load_checkpoint(last), last)
    recipe = check(task_type(values.get("task")).recipe_type, values, str(last))
    return train(recipe, folder, resume=True)


def load_run(checkpoint: str | Path, overrides: Sequence[str] = ()) -> tuple[Task, Recipe, nn.Module]:
    """The task, recipe and trained model that a checkpoint holds; nothing else is needed.

    Args:
        checkpoint: `checkpoints/best.ckpt` or `last.ckpt` of a run.
        overrides: `section.key=value` each, laid over its recipe.

    Raises:
        CheckpointError: It is missing, damaged, not of a run, or would run code.
        RecipeError: An override does not fit.
    """
    found = load_checkpoint(checkpoint)
    values, classes = contents(found, checkpoint)
    values = override_values(values, overrides)
    task_class = task_type(values.get("task"))
    recipe = check(task_class.recipe_type, values, str(checkpoint))
    task = task_class(recipe, classes)
    untrained = recipe.model.model_copy(update={"weights": None})  # the weights are in the checkpoint
    model = task.build_model(recipe.model_copy(update={"model": untrained}))
    try:
        model.load_state_dict(model_weights(found))
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: does not fit its own model: {error}") from error
    return task, recipe, model.eval()


def evaluate(checkpoint: str | Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Judge a checkpoint on the "val" split of its recipe's data; raises as `load_run` and the data do."""
    task, recipe, model = load_run(checkpoint, overrides)
    with _settings(recipe):
        trainer = _trainer(recipe, [])
        (scores,) = trainer.validate(
            TaskModule(task, recipe, model), _loader(task, recipe, "val", trainer), verbose=False
        )
    return dict(scores)


def predict(images: Sequence[str | Path], checkpoint: str | Path) -> list[Any]:
    """A prediction for each image file; all are read before the model runs.

    Raises:
        DataError: A file is missing or no image; the message names it.
        CheckpointError: As `load_run`.
    """
    decoded = [read_image(path) for path in images]
    task, _, model = load_run(checkpoint)
    return [prediction for image in decoded for prediction in task.predict(model, [image])]


def _loader(task: Task, recipe: Recipe, split: str, trainer: lightning.Trainer) -> ResumableLoader:
    training = split == "train"
    dataset: Any = task.dataset(split)
    batch_size, workers = recipe.train.batch_size, recipe.train.workers
    sampler = EpochSampler(
        len(dataset),
        seed=recipe.train.seed,
        shuffle=training,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        chunk=batch_size if training else 1,
        step=batch_size * trainer.world_size if training else 1,
    )
    if training and len(sampler) < batch_size:
        raise DataError(
            f"{len(dataset)} training samples on {trainer.world_size} processes do not fill one batch: set "
            f"train.batch_size, which is {batch_size}, to at most {len(dataset) // trainer.world_size}"
        )
    return ResumableLoader(
        dataset,
        sampler,
        task.collate(),
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _trainer(recipe: Recipe, callbacks: list[Callback]) -> lightning.Trainer:
    if recipe.train.precision == "16-mixed" and not torch.accelerator.is_available():
        raise RecipeError("train.precision: 16-mixed needs a GPU; on a CPU there is bf16-mixed")
    return lightning.Trainer(
        max_epochs=recipe.schedule.epochs,
        precision=recipe.train.precision,
        gradient_clip_val=recipe.optim.clip_grad,
        callbacks=[*callbacks, ProgressLine()],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=False,  # `Checkpoints` does it
        enable_progress_bar=False,  # `ProgressLine` is one
        enable_model_summary=False,
        use_distributed_sampler=False,  # `EpochSampler` deals to the ranks itself
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )


@contextmanager
def _settings(recipe: Recipe) -> Iterator[None]:
    """The recipe's threads, and Lightning without its advice, for the length of a run."""
    threads = torch.get_num_threads()
    level = logging.getLogger("lightning.pytorch").level
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        torch.set_num_threads(threads)
        logging.getLogger("lightning.pytorch").setLevel(level)
