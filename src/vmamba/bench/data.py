"""Measure how fast a recipe's data are read, and whether they or the model limit training."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from vmamba.train.loaders import batches_of_a_step, loader
from vmamba.train.module import TaskModule
from vmamba.train.recipe import Recipe, ScheduleRecipe
from vmamba.train.session import training_session
from vmamba.train.stop import at_step
from vmamba.train.tasks import task_type
from vmamba.train.threads import with_threads
from vmamba.train.trainer import settings, trainer_for


@dataclass(frozen=True)
class Loading:
    """Images a second of the training loader, with nothing else running.

    Attributes:
        workers: Processes that read; 0 is the training process itself.
        images_per_second: The median over rounds.
        low: The slowest round.
        high: The fastest round.
    """

    workers: int
    images_per_second: float
    low: float
    high: float


ROUNDS = 5


def bench_loader(recipe: Recipe, workers: int, batches: int = 20) -> Loading:
    """Time a recipe's training batches in rounds, after those that the workers have read ahead.

    Args:
        recipe: Whose data, augmentation and batch size are used.
        workers: Processes that read.
        batches: Batches to time; a shorter epoch is repeated.

    Raises:
        DataError: The data are missing or damaged.
    """
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": workers})})
    with settings(changed):
        task = task_type(changed.task)(changed)
        rates = []
        with closing(loader(task, task.recipe, "train", trainer_for(changed, []))) as data:
            source = _endless(data)
            for _ in range(max(2, 2 * workers)):
                next(source)
            for _ in range(ROUNDS):
                start = time.perf_counter()
                images = sum(len(loaded.indices) for loaded in islice(source, max(1, batches // ROUNDS)))
                rates.append(images / (time.perf_counter() - start))
    return Loading(workers, statistics.median(rates), min(rates), max(rates))


def _endless(data: Any) -> Iterator[Any]:
    epoch = 0
    while True:
        data.sampler.set_epoch(epoch)
        yield from data
        epoch += 1


class _SameBatch:
    """A training loader that reads one batch and yields it repeatedly."""

    def __init__(self, data: Any, times: int) -> None:
        self.batch_size, self.samples, self.read_again = data.batch_size, data.samples, data.read_again
        self.consumed, self.skipped = 0, data.skipped
        self._loaded, self._times = next(iter(data)), times

    def __len__(self) -> int:
        return self._times

    def __iter__(self) -> Iterator[Any]:
        return repeat(self._loaded, self._times)


class _StepTimes(Callback):
    """The seconds from the start of each step to its end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if at_step(trainer):
            if trainer.strategy.root_device.type != "cpu":
                torch.accelerator.synchronize()
            now = time.perf_counter()
            self.seconds.append(now - self._start)
            self._start = now


def bench_step(recipe: Recipe, rounds: int = 5) -> float:
    """Images a second of one process' training steps, on a batch that is already in memory.

    The same module runs in the same loop as in training, with the recipe's precision and accumulation.

    Args:
        recipe: Of the run.
        rounds: Steps to time, after two of warm-up; the result is the median.
    """
    steps = rounds + 2
    with settings(recipe):
        share = recipe.train.batch_size // trainer_for(recipe, []).world_size
    alone = recipe.train.model_copy(update={"batch_size": share, "devices": 1, "nodes": 1, "workers": 0})
    schedule = ScheduleRecipe(steps=steps, warmup_steps=0)
    recipe = recipe.model_copy(update={"schedule": schedule, "train": alone})
    with settings(recipe):
        times = _StepTimes()
        trainer = trainer_for(recipe, [times])
        size, passes = batches_of_a_step(recipe, trainer.world_size)
        trainer.accumulate_grad_batches = passes
        trainer.fit_loop.max_epochs = 1
        session = training_session(recipe)
        if trainer.strategy.root_device.type == "cpu":
            session = with_threads(session, size)
        with closing(loader(session.task, session.recipe, "train", trainer)) as batches:
            data = _SameBatch(batches, steps * passes)
        trainer.fit(TaskModule(session.task, session.recipe, session.model, steps), data)
    return size * passes / statistics.median(times.seconds[2:])


def verdict(loadings: Sequence[Loading], step: float, workers: int) -> str:
    """A sentence that says whether the data or the model limits training.

    Args:
        loadings: One for each number of workers.
        step: Images a second of the model.
        workers: Of the recipe.
    """
    enough = [each for each in loadings if each.workers > 0 and each.images_per_second > step]
    if enough:
        least = min(enough, key=lambda each: each.workers)
        return (
            f"the model is the slower one, {step:,.0f} images/s: {_of(least.workers)}, {_rate(least)}, keep "
            f"up with it (the recipe has {workers})"
        )
    best = max(loadings, key=lambda each: each.images_per_second)
    if best.workers == 0 and best.images_per_second > step:
        turns = 1 / (1 / best.images_per_second + 1 / step)
        return (
            f"without workers reading, {_rate(best)}, and training, {step:,.0f}, take turns: {turns:,.0f} "
            "together; a worker reads meanwhile"
        )
    return (
        f"the data are the slower ones: {_rate(best)} with {_of(best.workers)}, and the model takes "
        f"{step:,.0f}. More workers help where there are cores for them; smaller or packed files and less "
        "augmentation always do"
    )


def _rate(loading: Loading) -> str:
    return f"{loading.images_per_second:,.0f} images/s"


def _of(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"
