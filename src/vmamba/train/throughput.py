"""How fast a recipe's images come, and whether they or the model hold training up."""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from vmamba.train.module import TaskModule
from vmamba.train.recipe import Recipe
from vmamba.train.run import loader, settings, trainer_for
from vmamba.train.task import task_type


@dataclass(frozen=True)
class Loading:
    """Images a second of the training loader, with nothing else running.

    Attributes:
        workers: Processes that read; 0 is the training process itself.
        images_per_second: The median over rounds.
        low: Of the slowest round.
        high: Of the fastest.
    """

    workers: int
    images_per_second: float
    low: float
    high: float


ROUNDS = 5


def bench_loader(recipe: Recipe, workers: int, batches: int = 20) -> Loading:
    """Time a recipe's training batches in rounds, behind as many as the workers read ahead.

    Args:
        recipe: Whose data, augmentation and batch size are used.
        workers: Processes that read.
        batches: To time; the epoch starts again where it is shorter.

    Raises:
        DataError: The data are missing or damaged.
    """
    changed = recipe.model_copy(update={"train": recipe.train.model_copy(update={"workers": workers})})
    with settings(changed):
        task = task_type(changed.task)(changed)
        source = _endless(loader(task, changed, "train", trainer_for(changed, [])))
        for _ in range(max(2, 2 * workers)):
            next(source)
        rates = []
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


def bench_step(recipe: Recipe, rounds: int = 5) -> float:
    """Images a second of one process' training steps, on a batch that is there already.

    A step is augmentation of the batch, forward, backward, clipping, update and average, on the device, in
    the precision and in the parts of the recipe.

    Args:
        recipe: Of the run.
        rounds: Steps to time, behind two of warm-up; the median counts.
    """
    with settings(recipe):
        task = task_type(recipe.task)(recipe)
        trainer = trainer_for(recipe, [])
        device = trainer.strategy.root_device
        data: Any = loader(task, recipe, "train", trainer)
        first = next(iter(data))
        batch = trainer.strategy.batch_to_device(first.batch, device)
        parts = recipe.train.batch_size // (len(first.indices) * trainer.world_size)
        model: Any = task.build_model(recipe)
        if recipe.train.grad_checkpointing:
            model.set_grad_checkpointing(True)
        module = TaskModule(task, recipe, model, steps=1000).to(device).train()
        optimizer = module.configure_optimizers()["optimizer"]
        precision = trainer.precision_plugin
        times = []
        for _ in range(rounds + 2):
            start = time.perf_counter()
            optimizer.zero_grad()
            for _ in range(parts):
                with precision.forward_context():
                    loss = task.loss(model, task.mix(batch))["loss"] / parts
                loss.backward()
            if recipe.optim.clip_grad is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip_grad)
            optimizer.step()
            if module.ema is not None:
                module.ema.update(model)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
    return parts * len(first.indices) / statistics.median(times[2:])


def verdict(loadings: Sequence[Loading], step: float, workers: int) -> str:
    """Which of the two holds training up, in words.

    Args:
        loadings: By numbers of workers.
        step: Images a second of the model.
        workers: Of the recipe.
    """
    enough = [found for found in loadings if found.workers > 0 and found.images_per_second > step]
    if enough:
        least = min(enough, key=lambda found: found.workers)
        return (
            f"the model is the slower one, {step:,.0f} images/s: {_of(least.workers)}, {_rate(least)}, keep "
            f"up with it (the recipe has {workers})"
        )
    best = max(loadings, key=lambda found: found.images_per_second)
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


def _rate(found: Loading) -> str:
    return f"{found.images_per_second:,.0f} images/s"


def _of(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"
