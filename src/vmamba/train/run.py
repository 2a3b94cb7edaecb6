"""Start a run, resume it, extend it."""

import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch

from vmamba.data import ResumableLoader
from vmamba.data.classes import class_difference
from vmamba.environment import environment
from vmamba.errors import DataError, MissingCheckpointError, OutputError, ProcessError, RecipeError
from vmamba.files import write_atomically
from vmamba.models.checkpoints import CONTENTS, contents, run_folder, runs_hint
from vmamba.nn import SS2D
from vmamba.ops import default_backend
from vmamba.train.best import describe_model
from vmamba.train.callbacks import Checkpoints, Milestones
from vmamba.train.checkpoint import newest_checkpoint
from vmamba.train.curves import check_metrics
from vmamba.train.loaders import batches_of_a_step, loader
from vmamba.train.lock import locked
from vmamba.train.log import RunLog, run_log
from vmamba.train.loggers import loggers_for
from vmamba.train.module import TaskModule
from vmamba.train.progress import ProgressLine
from vmamba.train.recipe import Recipe, check, override_values
from vmamba.train.session import Session, training_session
from vmamba.train.stop import StopOnSignal, holds_run, how_to_go_on
from vmamba.train.sync_batchnorm import synchronise_batchnorm
from vmamba.train.task import Task
from vmamba.train.tasks import task_type
from vmamba.train.threads import with_threads
from vmamba.train.trainer import is_first_process, settings, trainer_for
from vmamba.words import counted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        folder: Of the run.
        scores: Of the last evaluation, as in metrics.csv.
        monitor: The score that chooses the best checkpoint.
        best: Its best value.
        best_step: The step after which that was reached.
        trained: Whether this call took any step; a finished run that is resumed takes none.
    """

    folder: Path
    scores: dict[str, float]
    monitor: str
    best: float | None
    best_step: int
    trained: bool = True


@dataclass(frozen=True)
class _Resumption:
    """The checkpoint that a run is resumed from."""

    path: Path
    step: int
    contents: Mapping[str, Any]
    changes: Mapping[str, list[Any]]
    """Old and new value of each key of the recipe that has changed."""


def train(recipe: Recipe, folder: str | Path) -> Outcome:
    """Run a recipe.

    Args:
        recipe: From `load_recipe`.
        folder: Of the run: recipe.yaml, env.json, history.jsonl, metrics.csv, curves.png, log.txt,
            best.safetensors with config.json, tensorboard/, and checkpoints/ with best.ckpt, last.ckpt and
            those kept from before.

    Raises:
        RecipeError: The folder holds a run already or another process runs there, or the recipe does not fit
            the machine.
        DataError: The data are missing or damaged, or a process that reads them died.
        CheckpointError: A checkpoint is damaged or cannot be written.
        NonFiniteError: A loss or gradient is not finite.
        ProcessError: Another process of the run died or hangs.
        Interrupted: A signal came; last.ckpt is written.
    """
    folder = Path(folder)
    _refuse_a_run(folder)
    with run_log(is_first_process()) as file_log:
        return _run(recipe, folder, file_log)


def _refuse_a_run(folder: Path) -> None:
    if holds_run(folder):
        raise RecipeError(
            f"{folder}: holds a run already; go on with it (vmamba resume {folder}), or name another folder"
        )


RESUMABLE = {
    f"train.{key}"
    for key in (
        "micro_batch_size",
        "workers",
        "threads",
        "grad_checkpointing",
        "compile",
        "accelerator",
        "devices",
        "nodes",
        "strategy",
        "collective_timeout",
        "checkpoint_every",
        "keep_checkpoints",
        "on_nonfinite",
        "on_error",
        "loader_timeout",
        "log_every",
        "loggers",
    )
} | {"data.root"}
"""Keys of a recipe that may change when a run is resumed: they affect how it runs, not what it learns."""

EXTENDABLE = ("schedule.", "augment.", "optim.lr", "optim.weight_decay", "optim.betas", "optim.clip_grad")
"""Prefixes of the keys that may change when a run is extended: the optimiser's state stays valid."""


def resume(
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    recipe: Recipe | None = None,
    extend: bool = False,
) -> Outcome:
    """Resume the run in a folder, by the recipe in it, from its newest undamaged checkpoint; see `train`.

    Args:
        folder: Of the run; its `checkpoints` or a file in them will do.
        overrides: `section.key=value` each, laid over its recipe.
        recipe: A recipe to use instead of the run's; it may differ only in the keys that may change.
        extend: Let the settings in `EXTENDABLE` change too, which affect what is learnt: the schedule (a
            finished run continues if it is longer), the rate and others. The optimiser keeps its state;
            history.jsonl and the checkpoints record what changed at which step.

    Raises:
        MissingCheckpointError: The folder has no checkpoint.
        RecipeError: An override or `recipe` would change what is learnt.
        DataError: The classes, or the number of samples, are not those that the run began with.
    """
    with run_log(is_first_process()) as file_log:
        folder = run_folder(folder)
        if not holds_run(folder):
            raise MissingCheckpointError(
                f"{folder}: not a run, or one that has no checkpoint yet; expected a folder with "
                f"checkpoints/last.ckpt{runs_hint(folder)}"
            )
        newest, checkpoint = newest_checkpoint(folder / "checkpoints")
        values, _ = contents(checkpoint, newest)
        task_class = task_type(values.get("task"))
        before = check(task_class.recipe_type, values, str(newest))
        _check_overrides(overrides, extend)
        changed = override_values(values, overrides, task_class.recipe_type)
        after = check(task_class.recipe_type, changed, str(newest))
        if recipe is not None:
            after = task_class.resolve(recipe)
            if after.train.threads is None:
                train = after.train.model_copy(update={"threads": before.train.threads})
                after = after.model_copy(update={"train": train})
        differences = changes(before, after)
        if refused := [key for key in differences if not _may_change(key, extend)]:
            raise RecipeError(
                f"{folder}: holds a run of another recipe, it differs in {', '.join(refused)}; name another "
                "folder"
            )
        resumption = _Resumption(newest, checkpoint["global_step"], checkpoint[CONTENTS], differences)
        return _run(after, folder, file_log, resumption)


def _may_change(key: str, extend: bool) -> bool:
    return key in RESUMABLE or (extend and (key.startswith(EXTENDABLE) or key == "train.eval_every_steps"))


def _check_overrides(overrides: Sequence[str], extend: bool) -> None:
    for override in overrides:
        key = override.partition("=")[0]
        if _may_change(key, extend):
            continue
        if _may_change(key, True):
            raise RecipeError(
                f"override {override!r}: a resumed run keeps what it learns by; to change it on purpose add "
                "--extend"
            )
        also = " and, with --extend, schedule.*, augment.*, optim.lr, …" if not extend else ""
        raise RecipeError(
            f"override {override!r}: a resumed run keeps its recipe; what may change is "
            f"{', '.join(sorted(RESUMABLE))}{also}"
        )


def changes(before: Recipe, after: Recipe) -> dict[str, list[Any]]:
    """The keys in which two recipes differ → both values."""
    old, new = before.settings(), after.settings()
    return {key: [old.get(key), new.get(key)] for key in {**old, **new} if old.get(key) != new.get(key)}


def _run(recipe: Recipe, folder: Path, file_log: RunLog, resumed: _Resumption | None = None) -> Outcome:
    with settings(recipe):
        recipe = task_type(recipe.task).resolve(recipe)
        progress = ProgressLine()
        trainer = trainer_for(recipe, [progress], loggers_for(recipe, folder))
        samples_of_a_pass, trainer.accumulate_grad_batches = batches_of_a_step(recipe, trainer.world_size)
        session = training_session(recipe)
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if resumed is None and on_cpu:  # a resumed run keeps its threads
            session = with_threads(session, samples_of_a_pass)
            recipe = session.recipe
        if recipe.train.sync_batchnorm and trainer.world_size > 1:
            session = replace(session, model=synchronise_batchnorm(session.model, on_cpu))
        training = loader(session.task, recipe, "train", trainer)
        validation = loader(session.task, recipe, "val", trainer)
        samples = {"train": training.sampler.length, "val": validation.sampler.length}
        if resumed is not None:
            _compare_data(resumed, session.task, samples)
        history = [*(resumed.contents.get("history", []) if resumed else []), _event(resumed)]
        module = _module(session, trainer, training, {"samples": samples, "history": history})
        if resumed is not None and resumed.step > module.steps:
            raise RecipeError(
                f"schedule: {module.steps} steps are fewer than the {resumed.step} that the run has done"
            )
        start = None if resumed is None else resumed.path
        checkpoints = Checkpoints(folder, recipe.train.keep_checkpoints, start)
        milestones = Milestones(folder, validation, checkpoints, progress)
        stop = StopOnSignal(folder, checkpoints.save, module.steps)
        trainer.callbacks += [milestones, stop]  # type: ignore[attr-defined]
        with locked(folder) if trainer.is_global_zero else nullcontext():
            if trainer.is_global_zero:
                _prepare(folder, recipe, trainer, history[-1], fresh=resumed is None)
                file_log.open(folder)
                _introduce(session, trainer, samples, module)
            with (
                closing(training),
                closing(validation),
                stop.listening(),
                _lost_process_explained(folder, trainer),
            ):
                trainer.fit(module, training, ckpt_path=start)
    trained = resumed is None or trainer.global_step > resumed.step
    if not trained and trainer.global_step >= module.steps:
        _tell_finished(folder, recipe)
    return Outcome(folder, milestones.scores, module.monitor, milestones.best, milestones.best_step, trained)


def _tell_finished(folder: Path, recipe: Recipe) -> None:
    """Log that a resumed run has nothing left to do, and how to train it longer."""
    unit = "steps" if recipe.schedule.epochs is None else "epochs"
    length = getattr(recipe.schedule, unit)
    log.info(
        "this run is finished: %d of %d %s; to train it longer: vmamba resume %s schedule.%s=%d --extend",
        *(length, length, unit, folder, unit, 2 * length),
    )


def _module(
    session: Session, trainer: lightning.Trainer, training: ResumableLoader, contents: dict[str, Any]
) -> TaskModule:
    """The module to train; also sets the trainer's number of epochs to the schedule's."""
    steps_per_epoch = len(training) // trainer.accumulate_grad_batches
    contents["config"] = describe_model(session.task, session.model)
    module = TaskModule(session.task, session.recipe, session.model, steps_per_epoch, contents)
    # Not Lightning's max_steps: with it a resume at an epoch's end would count that epoch twice.
    trainer.fit_loop.max_epochs = math.ceil(module.steps / steps_per_epoch)
    return module


def _event(resumed: _Resumption | None) -> dict[str, Any]:
    """A line of history.jsonl."""
    event: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": 0 if resumed is None else resumed.step,
        "command": sys.argv,
    }
    if resumed is not None and resumed.changes:
        event["changes"] = dict(resumed.changes)
    return event


def _compare_data(resumed: _Resumption, task: Task, samples: Mapping[str, int]) -> None:
    """Refuse to resume with other data: the order of samples and the meaning of labels would change."""
    classes = list(resumed.contents["classes"])
    if task.classes != classes:
        raise DataError(
            f"the data's {counted(len(task.classes), 'class', 'classes')} are not the {len(classes)} that "
            f"the run was started with: {class_difference(task.classes, classes)}; give it its data again "
            f"(data.root=…), or start a new run from its weights "
            f"(model.weights={resumed.path})"
        )
    for split, number in resumed.contents.get("samples", {}).items():
        if samples[split] != number:
            raise DataError(
                f"the split {split!r} has {counted(samples[split], 'sample')}, and had {number} when the run "
                f"was started; give it its data again (data.root=…), or start a new run from its weights "
                f"(model.weights={resumed.path})"
            )


_FILES = ("recipe.yaml", "env.json", "history.jsonl", "log.txt", "metrics.csv", "curves.png", "config.json")
_FOLDERS = ("checkpoints", "tensorboard")


def _prepare(
    folder: Path, recipe: Recipe, trainer: lightning.Trainer, event: dict[str, Any], fresh: bool
) -> None:
    """Check what the run's folder holds already, and write its first files."""
    if fresh:
        _refuse_a_run(folder)
    for name in _FILES:
        if (folder / name).is_dir():
            raise RecipeError(f"{folder / name}: a folder, where the run writes a file; move it away")
    for name in _FOLDERS:
        if (folder / name).exists() and not (folder / name).is_dir():
            raise RecipeError(f"{folder / name}: a file, where the run makes a folder; move it away")
    metrics, past = folder / "metrics.csv", folder / "history.jsonl"
    check_metrics(metrics)
    try:
        if fresh:  # left by a run that never reached a checkpoint
            metrics.unlink(missing_ok=True)
            past.unlink(missing_ok=True)
        lines = past.read_text(encoding="utf-8") if past.exists() else ""
        write_atomically(past, f"{lines}{json.dumps(event)}\n")
        write_atomically(folder / "recipe.yaml", recipe.to_yaml())
        values = {**environment(), "lightning": lightning.__version__, "processes": trainer.world_size}
        write_atomically(folder / "env.json", json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written to ({error})") from error


def _introduce(
    session: Session, trainer: lightning.Trainer, samples: Mapping[str, int], module: TaskModule
) -> None:
    """Log at the start what is trained on which data and devices."""
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    device, processes = trainer.strategy.root_device, trainer.world_size
    states = [module.config.d_state for module in session.model.modules() if isinstance(module, SS2D)]
    log.info(
        "%s of %s M parameters for %s; %s to train on, %s to evaluate",
        session.recipe.model.name,
        f"{parameters / 1e6:.2f}",
        counted(len(session.task.classes), "class", "classes"),
        counted(samples["train"], "sample"),
        f"{samples['val']:,}",
    )
    log.info(
        "%s of %s on %s%s, %s%s",
        counted(module.steps, "step"),
        counted(session.recipe.train.batch_size, "sample"),
        device,
        f", {processes} processes" if processes > 1 else "",
        counted(torch.get_num_threads(), "thread")
        if device.type == "cpu"
        else session.recipe.train.precision,
        f", scans by the backend {default_backend(device, max(states), prove=True)}" if states else "",
    )


@contextmanager
def _lost_process_explained(folder: Path, trainer: lightning.Trainer) -> Iterator[None]:
    """Turn a broken connection between the processes into a `ProcessError` that explains it."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
        if trainer.world_size == 1 or not lost:
            raise
        raise ProcessError(
            f"process {trainer.global_rank} of {trainer.world_size} lost another one, which died or hangs; "
            f"its own message says why, if it had time; {how_to_go_on(folder)} ({error})"
        ) from error
