"""The data loaders of a process."""

from typing import Any, Literal

import lightning
import torch

from vmamba.data import ResumableLoader, sampler_for
from vmamba.errors import DataError, RecipeError
from vmamba.train.recipe import Recipe
from vmamba.train.task import SampleDataset, Task
from vmamba.words import counted


def batches_of_a_step(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Samples of a forward pass in one process, and passes per step (gradient accumulation).

    Raises:
        RecipeError: The batch size is not divisible by the processes and the micro batch size.
    """
    train = recipe.train
    share, rest = divmod(train.batch_size, processes)
    if rest or not share:
        raise RecipeError(
            f"train.batch_size: a step's {counted(train.batch_size, 'sample')} cannot be divided among "
            f"{counted(processes, 'process', 'processes')}"
        )
    size = min(train.micro_batch_size or share, share)
    if share % size:
        raise RecipeError(
            f"train.micro_batch_size: {size} does not divide the {counted(share, 'sample')} that a process "
            f"takes of train.batch_size {train.batch_size} ({counted(processes, 'process', 'processes')})"
        )
    return size, share // size


def loader(
    task: Task,
    recipe: Recipe,
    split: Literal["train", "val"],
    trainer: lightning.Trainer,
    samples: SampleDataset | None = None,
) -> ResumableLoader:
    """The batches of a split that a process reads.

    Args:
        task: With the data.
        recipe: Of the task.
        split: "train" or "val".
        trainer: Knows the processes among which the samples are divided.
        samples: Those of the split, if they are open already.

    Raises:
        DataError: The data are missing or damaged, or fewer than a step takes.
        RecipeError: The batch size does not fit the processes or the task.
    """
    training = split == "train"
    dataset: Any = task.dataset(split) if samples is None else samples
    train = recipe.train
    size, _ = batches_of_a_step(recipe, trainer.world_size)
    together = size * (trainer.world_size if train.sync_batchnorm else 1)
    if training and together < task.least_at_once:
        raise RecipeError(
            f"train.batch_size: BatchNorm would see {counted(together, 'sample')} at a time and needs at "
            f"least {task.least_at_once}: raise train.batch_size or train.micro_batch_size, or on several "
            "processes set train.sync_batchnorm=true"
        )
    if task.needs_pairs and size % 2:
        key = "train.batch_size" if train.micro_batch_size is None else "train.micro_batch_size"
        raise RecipeError(
            f"{key}: {getattr(train, key.removeprefix('train.'))} gives a process "
            f"{counted(size, 'sample')} at a time, an odd number; Mixup and CutMix pair them"
        )
    if not training and task.eval_batch_size is not None:
        size = task.eval_batch_size
    sampler = sampler_for(
        dataset,
        training,
        seed=train.seed,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        chunk=size if training else 1,
        step=train.batch_size if training else 1,
    )
    if training and not len(sampler):
        raise DataError(
            f"{counted(len(dataset), 'training sample')} cannot fill one batch: set train.batch_size, which "
            f"is {train.batch_size}, to at most {len(dataset)}"
        )
    return ResumableLoader(
        dataset,
        sampler,
        task.collate(),
        on_error="raise" if train.on_error == "raise" else "replace" if training else "drop",
        timeout=train.loader_timeout,
        batch_size=size,
        num_workers=train.workers,
        persistent_workers=train.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
