"""Lightning's trainer as a recipe has it."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from vmamba._torch_private import cpu_computes_in
from vmamba.errors import RecipeError
from vmamba.train.checkpoint import AtomicCheckpointIO
from vmamba.train.launcher import PatientDDP, PatientFSDP
from vmamba.train.recipe import Recipe

log = logging.getLogger(__name__)

_NOISE = [
    ".*does not have many workers.*",  # for small data sets 0 workers are fastest
    ".*is smaller than the logging interval.*",  # the epoch's mean is logged anyway
    r".*module\(s\) in eval mode at the start of training.*",  # the averaged model's
    ".*It is recommended to use .self.log.*sync_dist=True.*",  # torchmetrics has synchronised already
    ".*Grad strides do not match bucket view strides.*",  # only depthwise kernels: a few kilobytes
    ".*isinstance.treespec, LeafSpec.. is deprecated.*",  # Lightning's use of PyTorch
    ".*This DataLoader will create .* worker processes.*",  # more than processors: storage may be slow
    ".*Palette images with Transparency.*",  # Pillow's; we read them correctly
    ".*Image size .* exceeds limit of .* pixels, could be decompression bomb.*",  # below Pillow's own refusal
    ".*warmup_t.*t_initial.*",  # timm's schedule, if the warm-up is most of the run
]
"""Warnings of other libraries that do not concern the user."""


def trainer_for(
    recipe: Recipe, callbacks: Sequence[Callback], loggers: Sequence[Logger] | bool = False
) -> lightning.Trainer:
    """Lightning's loop as a recipe has it, on the machine at hand.

    Raises:
        RecipeError: The recipe does not fit the machine.
    """
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
    if precision == "16-mixed" and on_cpu:
        # On a CPU Lightning's "16-mixed" means bfloat16, so we build the float16 plugin ourselves.
        plugins.append(MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu")))
        precision = None
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # `StopOnSignal` does it
    return lightning.Trainer(
        accelerator="cpu" if on_cpu else train.accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=_strategy(recipe, devices, nodes),
        max_epochs=-1,  # the caller sets `fit_loop.max_epochs`
        precision=precision,
        gradient_clip_val=recipe.optim.clip_grad,
        callbacks=list(callbacks),
        plugins=plugins,
        logger=loggers,
        log_every_n_steps=train.log_every,
        enable_checkpointing=False,  # `Milestones` does it, and evaluates
        enable_progress_bar=False,  # `ProgressLine` is one
        enable_model_summary=False,
        use_distributed_sampler=False,  # `EpochSampler` deals to the ranks itself
        num_sanity_val_steps=0,
    )


def _warn_of_emulation(precision: str) -> None:
    """Warn if the CPU only emulates a half precision, which makes products many times slower."""
    kind = {"bf16-mixed": "bf16", "16-mixed": "fp16"}.get(precision)
    if kind is not None and not cpu_computes_in(kind):
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
        return PatientFSDP(
            data_parallel_size=devices * nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            timeout=timeout,
        )
    return PatientDDP(timeout=timeout, gradient_as_bucket_view=True)


@contextmanager
def settings(recipe: Recipe) -> Iterator[None]:
    """Set the recipe's threads and silence advice of Lightning and other libraries, inside a `with` block."""
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


def is_first_process() -> bool:
    """Whether this process is the one that logs and prints for all processes of a run."""
    return getattr(rank_zero_only, "rank", 0) == 0
