"""Train, evaluate and predict: what the command's verbs do."""

import json
import logging
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

import vmamba
from vmamba.data import EpochSampler, ResumableLoader, read_image
from vmamba.errors import CheckpointError, RecipeError
from vmamba.train import classification  # noqa: F401  (registers its task)
from vmamba.train.callbacks import MetricsFile, StopOnInterrupt, Throughput, progress_bar
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


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: A YAML file.
        overrides: `section.key=value` each, laid over it.

    Raises:
        RecipeError: Something in it is missing, unknown or of the wrong type; the message names each.
    """
    values = read_values(source, overrides)
    return check(task_type(values.get("task")).recipe_type, values, str(source))


def train(recipe: Recipe, folder: str | Path, *, resume: bool = False) -> dict[str, float]:
    """Run a recipe.

    Args:
        recipe: From `load_recipe`.
        folder: Of the run: recipe.yaml, env.json, metrics.csv, curves.png, checkpoints/best.ckpt and last.ckpt.
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
    if resume:
        load_checkpoint(last)  # a damaged one is told before anything is built
    elif last.exists():
        raise RecipeError(f"{folder}: holds a run already; resume it with --resume, or name another folder")
    task = task_type(recipe.task)(recipe)
    trainer = _trainer(
        recipe,
        [
            ModelCheckpoint(
                folder / "checkpoints",
                filename="best",
                monitor=f"val/{task.monitor}",
                mode="max",
                save_last=True,
                enable_version_counter=False,
            ),
            StopOnInterrupt(folder),
            Throughput(),
            MetricsFile(folder),
            *progress_bar(),
        ],
    )
    with _settings(recipe):
        torch.manual_seed(recipe.train.seed)
        model = task.build_model(recipe)
        if recipe.train.grad_checkpointing:
            model.set_grad_checkpointing(True)
        loaders = [_loader(task, recipe, split, trainer) for split in ("train", "val")]
        if trainer.is_global_zero:
            write_atomically(folder / "recipe.yaml", lambda file: file.write(recipe.to_yaml().encode()))
            environment = json.dumps(_environment(), indent=2) + "\n"
            write_atomically(folder / "env.json", lambda file: file.write(environment.encode()))
        trainer.fit(TaskModule(task, recipe, model), *loaders, ckpt_path=last if resume else None)
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def resume(folder: str | Path) -> dict[str, float]:
    """Go on with the run in a folder, by its own recipe; see `train`."""
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise CheckpointError(f"{folder}: no run to resume, there is no recipe.yaml in it")
    return train(load_recipe(folder / "recipe.yaml"), folder, resume=True)


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
    held = contents(found, checkpoint)
    values = override_values(held["recipe"], overrides)
    values["model"] = {**values["model"], "weights": None}  # they are in the checkpoint
    task_class = task_type(values.get("task"))
    recipe = check(task_class.recipe_type, values, str(checkpoint))
    task = task_class(recipe, held["classes"])
    model = task.build_model(recipe)
    try:
        model.load_state_dict(model_weights(found))
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint}: does not fit its own model: {error}") from error
    return task, recipe, model.eval()


def evaluate(checkpoint: str | Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Judge a checkpoint on the "val" split of its recipe's data; raises as `load_run` and the data do."""
    task, recipe, model = load_run(checkpoint, overrides)
    trainer = _trainer(recipe, progress_bar())
    with _settings(recipe):
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
    sampler = EpochSampler(
        len(dataset),
        seed=recipe.train.seed,
        shuffle=training,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        even=training,
    )
    workers = recipe.train.workers
    return ResumableLoader(
        dataset,
        sampler,
        batch_size=recipe.train.batch_size,
        drop_last=training and len(sampler) >= recipe.train.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=task.collate(),
        pin_memory=torch.cuda.is_available(),
    )


def _trainer(recipe: Recipe, callbacks: list[Callback]) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=recipe.schedule.epochs,
        precision=recipe.train.precision,
        gradient_clip_val=recipe.optim.clip_grad,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=any(type(callback).__name__ == "RunProgressBar" for callback in callbacks),
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
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
            yield
    finally:
        torch.set_num_threads(threads)
        logging.getLogger("lightning.pytorch").setLevel(level)


def _environment() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "vmamba": vmamba.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "lightning": lightning.__version__,
        "platform": platform.platform(),
        "processor": platform.processor(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "engines": {status.name: status.reason or "available" for status in vmamba.ops.backends()},
    }
