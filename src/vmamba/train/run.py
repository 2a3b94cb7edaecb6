"""Train by a recipe, and go on with a run."""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vmamba.data import ResumableLoader, sampler_for, seeded
from vmamba.environment import environment
from vmamba.errors import DataError, ProcessError, RecipeError
from vmamba.files import write_atomically
from vmamba.models.checkpoints import contents
from vmamba.train.callbacks import (
    Blemishes,
    Checkpoints,
    MetricsFile,
    ProgressLine,
    StopOnSignal,
    Throughput,
)
from vmamba.train.checkpoint import AtomicCheckpointIO, earlier_checkpoints, newest_checkpoint
from vmamba.train.module import TaskModule
from vmamba.train.recipe import Recipe, check, override_values, read_values
from vmamba.train.task import Task, task_type

log = logging.getLogger(__name__)

_NOISE = [
    ".*does not have many workers.*",  # for small sets none is fastest
    ".*is smaller than the logging interval.*",  # the epoch's mean is there all the same
    r".*module\(s\) in eval mode at the start of training.*",  # the average's
    ".*It is recommended to use .self.log.*sync_dist=True.*",  # torchmetrics has done it
    ".*Grad strides do not match bucket view strides.*",  # of depthwise kernels: a few kilobytes
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


def train(recipe: Recipe, folder: str | Path, *, resume_from: Path | None = None) -> dict[str, float]:
    """Run a recipe.

    Args:
        recipe: From `load_recipe`.
        folder: Of the run: recipe.yaml, env.json, metrics.csv, curves.png, log.txt, tensorboard/ and
            checkpoints/ with best.ckpt, last.ckpt and those kept from before.
        resume_from: A checkpoint of the folder to go on from; see `resume`.

    Returns:
        The metrics of the last evaluation.

    Raises:
        RecipeError: The folder holds a run already, or the recipe does not fit the machine.
        DataError: The data are missing or damaged, or a process that reads them died.
        CheckpointError: A checkpoint is damaged or cannot be written.
        NonFiniteError: A loss or gradient is not finite.
        ProcessError: Another process of the run died or hangs.
        Interrupted: A signal came; last.ckpt is written.
    """
    folder = Path(folder)
    if resume_from is None and holds_run(folder):
        raise RecipeError(f"{folder}: holds a run already; resume it with --resume, or name another folder")
    with settings(recipe):
        task = task_type(recipe.task)(recipe)
        checkpoints = Checkpoints(
            folder, recipe.train.checkpoint_every, recipe.train.keep_checkpoints, resume_from
        )
        stop = StopOnSignal(folder, checkpoints.save)
        trainer = trainer_for(
            recipe,
            [
                Throughput(),
                Blemishes(),
                MetricsFile(folder),
                checkpoints,  # behind the row of the epoch
                stop,  # behind its checkpoint
            ],
            _loggers(recipe, folder),
        )
        trainer.accumulate_grad_batches = _parts(recipe, trainer.world_size)[1]
        training, validation = (loader(task, recipe, split, trainer) for split in ("train", "val"))
        with seeded("initialisation", recipe.train.seed):
            model: Any = task.build_model(recipe)
        if recipe.train.grad_checkpointing:
            model.set_grad_checkpointing(True)
        if trainer.is_global_zero:
            write_atomically(folder / "recipe.yaml", recipe.to_yaml())
            found = {**environment(), "lightning": lightning.__version__, "processes": trainer.world_size}
            write_atomically(folder / "env.json", json.dumps(found, indent=2) + "\n")
        steps = recipe.schedule.epochs * (len(training) // trainer.accumulate_grad_batches)
        module = TaskModule(task, recipe, model, steps)
        with stop.listening(), _log_file(folder, trainer), _deaths_told(folder, trainer):
            trainer.fit(module, training, validation, ckpt_path=resume_from)
    return checkpoints.scores


def holds_run(folder: str | Path) -> bool:
    """Whether there is a checkpoint to go on from, be it damaged."""
    checkpoints = Path(folder) / "checkpoints"
    return (checkpoints / "last.ckpt").exists() or bool(earlier_checkpoints(checkpoints))


def is_first_process() -> bool:
    """Whether it is this process' turn to speak for all of a run."""
    return getattr(rank_zero_only, "rank", 0) == 0


RESUMABLE = {
    *("micro_batch_size", "workers", "threads", "grad_checkpointing", "compile", "accelerator", "devices"),
    *("nodes", "strategy", "collective_timeout", "checkpoint_every", "keep_checkpoints", "on_nonfinite"),
    *("on_error", "loader_timeout", "log_every", "loggers"),
}
"""Keys of `train` that may change when a run is resumed: they say how it runs, not what it learns."""


def resume(
    folder: str | Path, overrides: Sequence[str] = (), *, recipe: Recipe | None = None
) -> dict[str, float]:
    """Go on with the run in a folder, by the recipe in it, from its newest whole checkpoint; see `train`.

    Args:
        folder: Of the run.
        overrides: `train.key=value` each, of the keys in `RESUMABLE`, laid over its recipe; or `data.root`.
        recipe: What the caller holds the run's recipe to be.

    Raises:
        RecipeError: An override would change what is learnt, or `recipe` is another one.
    """
    newest, checkpoint = newest_checkpoint(Path(folder) / "checkpoints")
    values, _ = contents(checkpoint, newest)
    may_change = {"data.root", *(f"train.{key}" for key in RESUMABLE)}
    for override in overrides:
        if override.partition("=")[0] not in may_change:
            raise RecipeError(
                f"override {override!r}: a resumed run keeps its recipe; what may change is "
                f"{', '.join(sorted(may_change))}"
            )
    found = check(task_type(values.get("task")).recipe_type, override_values(values, overrides), str(newest))
    if recipe is not None:
        mine, theirs = _flat(recipe.model_dump()), _flat(found.model_dump())
        differing = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if changed := [key for key in differing if key not in may_change]:
            raise RecipeError(
                f"{folder}: holds a run of another recipe, it differs in {', '.join(changed)}; name another "
                "folder"
            )
        found = recipe
    return train(found, folder, resume_from=newest)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and prefix != "model.":  # a model's arguments are one value
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _parts(recipe: Recipe, processes: int) -> tuple[int, int]:
    """Samples of one pass through the model in one process, and passes of a step."""
    train = recipe.train
    share, rest = divmod(train.batch_size, processes)
    if rest or not share:
        raise RecipeError(
            f"train.batch_size: {train.batch_size} samples of a step do not divide among {processes} "
            "processes"
        )
    part = min(train.micro_batch_size or share, share)
    if share % part:
        raise RecipeError(
            f"train.micro_batch_size: {part} does not divide the {share} samples that each of {processes} "
            f"processes takes of train.batch_size {train.batch_size}"
        )
    return part, share // part


def loader(task: Task, recipe: Recipe, split: str, trainer: lightning.Trainer) -> ResumableLoader:
    """The batches of a split that a process reads."""
    training = split == "train"
    dataset: Any = task.dataset(split)
    train = recipe.train
    part, _ = _parts(recipe, trainer.world_size)
    if task.pairs and part % 2:
        raise RecipeError(
            f"train.batch_size: {train.batch_size} gives each of {trainer.world_size} processes {part} "
            "samples at a time, an odd number; Mixup and CutMix pair them"
        )
    sampler = sampler_for(
        dataset,
        training,
        seed=train.seed,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        chunk=part if training else 1,
        step=train.batch_size if training else 1,
    )
    if training and not len(sampler):
        raise DataError(
            f"{len(dataset)} training samples do not fill one batch: set train.batch_size, which is "
            f"{train.batch_size}, to at most {len(dataset)}"
        )
    return ResumableLoader(
        dataset,
        sampler,
        task.collate(),
        on_error="raise" if train.on_error == "raise" else "replace" if training else "drop",
        timeout=train.loader_timeout,
        batch_size=part,
        num_workers=train.workers,
        persistent_workers=train.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def trainer_for(
    recipe: Recipe, callbacks: list[Callback], loggers: Sequence[Logger] | bool = False
) -> lightning.Trainer:
    """Lightning's loop as a recipe has it, on the machine at hand."""
    train = recipe.train
    if train.accelerator == "gpu" and not torch.accelerator.is_available():
        raise RecipeError("train.accelerator: there is no GPU here, or this PyTorch is built without one")
    on_cpu = train.accelerator == "cpu" or not torch.accelerator.is_available()
    if train.precision in ("16-mixed", "64-true") and train.strategy == "fsdp":
        raise RecipeError(
            f"train.precision: {train.precision} does not go with train.strategy fsdp; use bf16-mixed"
        )
    if on_cpu:
        _warn_of_emulation(train.precision)
    devices, nodes = _processes(recipe, on_cpu)
    plugins: list[Any] = [AtomicCheckpointIO()]
    precision: Any = train.precision
    if precision == "16-mixed" and on_cpu:  # by its name Lightning takes bfloat16 there
        plugins.append(MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu")))
        precision = None
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # `StopOnSignal` does it
    return lightning.Trainer(
        accelerator="cpu" if on_cpu else train.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=_strategy(recipe, devices, nodes),
        max_epochs=recipe.schedule.epochs,
        precision=precision,
        gradient_clip_val=recipe.optim.clip_grad,
        callbacks=[*callbacks, ProgressLine()],
        plugins=plugins,
        logger=loggers,
        log_every_n_steps=train.log_every,
        enable_checkpointing=False,  # `Checkpoints` does it
        enable_progress_bar=False,  # `ProgressLine` is one
        enable_model_summary=False,
        use_distributed_sampler=False,  # `EpochSampler` deals to the ranks itself
        num_sanity_val_steps=0,
    )


def _warn_of_emulation(precision: str) -> None:
    """Tell that a CPU has no instructions for a half precision: its products take many times as long."""
    kind = {"bf16-mixed": "bf16", "16-mixed": "fp16"}.get(precision)
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    if supported is not None and not supported():
        log.warning(
            "train.precision: this CPU has no instructions for %s and emulates it, many times "
            "slower; train.precision=32-true is faster here",
            precision,
        )


def _processes(recipe: Recipe, on_cpu: bool) -> tuple[int, int]:
    """Processes a node, and nodes: those of the recipe, of torchrun or of SLURM, or one for each GPU here."""
    devices, nodes = recipe.train.devices, recipe.train.nodes
    env = os.environ
    if TorchElasticEnvironment.detect():
        local = int(env["LOCAL_WORLD_SIZE"])
        devices, nodes = devices or local, nodes or int(env["WORLD_SIZE"]) // local
    elif SLURMEnvironment.detect():
        nodes = nodes or int(env.get("SLURM_NNODES", "1"))
        devices = devices or int(env["SLURM_NTASKS"]) // nodes
    return devices or (1 if on_cpu else torch.accelerator.device_count()), nodes or 1


def _strategy(recipe: Recipe, devices: int, nodes: int) -> Any:
    if devices == 1 and nodes == 1:
        return "auto"
    timeout = timedelta(seconds=recipe.train.collective_timeout)
    if recipe.train.strategy == "fsdp":
        return ModelParallelStrategy(
            data_parallel_size=devices * nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timeout,
        )
    return DDPStrategy(timeout=timeout, gradient_as_bucket_view=True)


def _loggers(recipe: Recipe, folder: Path) -> list[Logger]:
    loggers: list[Logger] = [TensorBoardLogger(folder, name="tensorboard", version="")]
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


@contextmanager
def _log_file(folder: Path, trainer: lightning.Trainer) -> Iterator[None]:
    """What is told while it runs, in log.txt too."""
    if not trainer.is_global_zero:
        yield
        return
    handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("vmamba")
    logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        handler.emit(logger.makeRecord(logger.name, logging.ERROR, "", 0, str(error), (), None))
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def _deaths_told(folder: Path, trainer: lightning.Trainer) -> Iterator[None]:
    """A broken connection between the processes as what it means."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
        if trainer.world_size == 1 or not lost:
            raise
        again = (
            f"To go on: vmamba train --resume {folder}"
            if holds_run(folder)
            else "There is no checkpoint yet: start the run again"
        )
        raise ProcessError(
            f"process {trainer.global_rank} of {trainer.world_size} lost another one, which died or hangs; "
            f"its own message says why, if it had time. {again} ({error})"
        ) from error


@contextmanager
def settings(recipe: Recipe) -> Iterator[None]:
    """The recipe's threads, and Lightning without its advice, for the length of a run."""
    threads = torch.get_num_threads()
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
