"""The one Lightning module: it trains and evaluates any task."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning
import torch
import torch.distributed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import vmamba
from vmamba._torch_private import AnyBatchNorm
from vmamba.data import LoadedBatch, SampleKey, draw_seed, seeded
from vmamba.errors import DataError
from vmamba.models.checkpoints import CONTENTS
from vmamba.train.guard import NonFiniteError, first_nonfinite
from vmamba.train.means import RunningMeans, gather
from vmamba.train.optim import (
    create_optimizer,
    create_scheduler,
    muon_in_float32,
    sharding_units,
    total_steps,
)
from vmamba.train.recipe import Recipe
from vmamba.train.task import Task, scores

MOST_SKIPPED = 10
"""Steps in a row without a finite gradient after which the run ends: more are no accident."""

MOST_SCALED = 40
"""The same with a loss scaler, which halves its scale after each such step until gradients are finite."""

log = logging.getLogger(__name__)


class TaskModule(lightning.LightningModule):
    """A task, its recipe and its model, in Lightning's loop.

    What a step draws for its batch (Mixup) is a function of (seed, epoch, step), the same on every process,
    and what the model draws (drop path, the detector's choice of boxes) of (seed, step, which share of the
    step's samples it sees): a checkpoint needs no random state, and who computes a share changes nothing.

    Args:
        task: What is trained.
        recipe: Of the task.
        model: From the task.
        steps_per_epoch: For the schedule. Lightning's own estimate would set up the data before the
            checkpoint is read, and leave the loader's state in it unread.
        contents: What checkpoints hold besides recipe and classes.

    Attributes:
        ema: The average of the model's weights, where the recipe asks for one.
        losses: Of the last batch, by name.
        means: Of the losses since the last row of metrics.csv.
        skipped_steps: Steps since the start or resume that were skipped for a gradient that was not finite.
    """

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        model: nn.Module,
        steps_per_epoch: int = 1,
        contents: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.task, self.recipe, self.model, self.steps_per_epoch = task, recipe, model, steps_per_epoch
        self.contents = dict(contents or {})
        self.val_metrics: Any = nn.ModuleDict({"raw": task.metrics()})
        self.ema: ModelEmaV3 | None = None
        if recipe.train.ema_decay is not None:
            self.ema = ModelEmaV3(model, recipe.train.ema_decay, use_warmup=recipe.train.ema_warmup)
            self.ema.requires_grad_(False)
            self.val_metrics["ema"] = task.metrics()
        if recipe.train.compile:
            self.model.compile()
        self.losses: dict[str, Tensor] = {}
        self.means = RunningMeans()
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._step_batches: list[tuple[int, list[SampleKey]]] = []  # batches of the step so far
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._finite: Tensor | None = None
        self._scheduler: Any = None
        self._group_settings: list[dict[str, Any]] = []

    def configure_model(self) -> None:
        """With FSDP, shard the model and its average, block by block."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for model in [self.model] if self.ema is None else [self.model, self.ema.module]:
            for block in sharding_units(model):
                fully_shard(block, mesh=mesh)
            if not isinstance(model, FSDPModule):  # unless the model is itself a block, and so sharded above
                fully_shard(model, mesh=mesh)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Gather all shards for an evaluation: processes with fewer batches would not join later gathers."""
        sharded = [module for module in self.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in sharded:
                module.set_reshard_after_forward(True, recurse=False)
                module.reshard()

    def train(self, mode: bool = True) -> "TaskModule":
        """Set the mode; what is frozen stays in evaluation mode, so that its features never change."""
        super().train(mode)
        if self.recipe.model.freeze is not None:
            self.task.frozen(self.model).eval()
        return self

    def training_step(self, loaded: LoadedBatch, batch_idx: int) -> Tensor:
        # A checkpoint is written between steps, so the samples of this step count as consumed.
        loader: Any = self.trainer.train_dataloader
        loader.consumed = (batch_idx + 1) * loader.batch_size * self.trainer.world_size
        if not self._step_batches and self.recipe.train.on_nonfinite == "skip":
            self._statistics = batchnorm_statistics(self.model)
        self._step_batches.append((batch_idx, loaded.keys))
        losses = self._losses(loaded.batch, batch_idx)
        loss = losses["loss"]
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        self.losses = {name: value.detach() for name, value in losses.items()}
        self.means.add(self.losses, loader.batch_size)
        return loss

    def _losses(self, batch: Any, batch_idx: int) -> Mapping[str, Tensor]:
        """The losses of a batch; draws are seeded by step and share, so that a resumed run repeats them."""
        seed = self.recipe.train.seed
        step_of_epoch, passes_before = divmod(batch_idx, self.trainer.accumulate_grad_batches)
        with self._drawing("mix", seed, self.current_epoch, step_of_epoch):
            batch = self.task.augment_batch(batch)
        share = passes_before * self.trainer.world_size + self.global_rank
        with self._drawing("step", seed, self.global_step, share):
            return self.task.training_step(self.model, batch)

    def _loss(self, batch: Any, batch_idx: int) -> Tensor:
        return self._losses(batch, batch_idx)["loss"]

    @contextmanager
    def _drawing(self, purpose: str, *counters: int) -> Iterator[None]:
        with seeded(purpose, *counters):
            if self.device.type != "cpu":
                torch.manual_seed(draw_seed(purpose, *counters))
            yield

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the gradient's norm; without a finite norm skip the step, or end the run."""
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        assert self._finite is not None
        # A gradient is the same on every process after the reduction, a loss is not.
        loss_finite = self.trainer.strategy.reduce_boolean_decision(bool(self._finite), all=True)
        gradient_finite = bool(norm.isfinite())
        # A loss scaler makes gradients overflow on purpose, and skips the step.
        scaled = self.recipe.train.precision == "16-mixed"
        if loss_finite and (gradient_finite or scaled):
            if gradient_clip_val is not None and gradient_finite:
                torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
            self._skipped_in_a_row = 0 if gradient_finite else self._skipped_in_a_row + 1
            self.skipped_steps += not gradient_finite
        else:
            optimizer.zero_grad()  # so that the step does nothing; and the diagnosis needs the memory
            self._report_nonfinite("gradient" if loss_finite else "loss")
            for buffer, before in self._statistics:  # else one bad batch would stay in every evaluation
                buffer.copy_(before)
            self._skipped_in_a_row += 1
            self.skipped_steps += 1
        most = MOST_SCALED if scaled and loss_finite else MOST_SKIPPED
        if self._skipped_in_a_row >= most:
            raise NonFiniteError(
                f"{most} steps in a row without a finite gradient, till step {self.global_step + 1}: "
                "lower optim.lr, or train in a wider precision"
            )

    def _synchronised(self) -> bool:
        return self.recipe.train.sync_batchnorm and self.trainer.world_size > 1

    def _report_nonfinite(self, what: str) -> None:
        """Read the step's samples again, which were not kept, and look for the layer that fails."""
        loader: Any = self.trainer.train_dataloader
        source, names = "", []
        for batch_idx, keys in self._step_batches:
            of_batch = [loader.samples.name(key.index) for key in keys]
            names += of_batch
            if isinstance(self.model, FSDPModule) or self._synchronised():
                source = "not looked for in a model whose layers wait for other processes"
                continue
            batch = self.trainer.strategy.batch_to_device(loader.read_again(keys))
            with torch.compiler.set_stance("force_eager"), self.trainer.precision_plugin.forward_context():
                source = first_nonfinite(self.model, batch, partial(self._loss, batch, batch_idx))
            if not source.startswith("nothing"):
                names = of_batch
                break
        message = (
            f"the {what} of step {self.global_step + 1} (epoch {self.current_epoch + 1}) is not finite; "
            f"first so: {source}; samples of the batch: {', '.join(names)}"
        )
        if self.recipe.train.on_nonfinite == "raise":
            raise NonFiniteError(
                f"{message}; lower optim.lr, train in a wider precision, or leave such steps out with "
                "train.on_nonfinite=skip"
            )
        log.warning("%s; the step is left out", message)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        emulated = self.device.type == "cpu" and "muon" in self.recipe.optim.name
        with muon_in_float32() if emulated else nullcontext():
            super().optimizer_step(*args, **kwargs)
        self._step_batches, self._finite = [], None
        if self.ema is not None:
            # Given the step, timm starts the average as a copy of the weights after the first one.
            self.ema.update(self.model, step=self.global_step if self.recipe.train.ema_warmup else None)

    def evaluate(self, loader: Any, after_batch: Callable[[], None]) -> dict[str, float]:
        """Scores and mean losses of the weights, and of their average, on a loader's samples.

        Args:
            loader: Of the split "val".
            after_batch: Called after each batch.

        Returns:
            By name: val/<score> and val/ema_<score>.

        Raises:
            DataError: Not one sample can be read.
            NonFiniteError: A loss or the score that chooses the best checkpoint is not finite, and
                `train.on_nonfinite` says to stop.
        """
        self._broadcast_buffers()
        models = {"raw": self.model} if self.ema is None else {"raw": self.model, "ema": self.ema.module}
        means = {weights: RunningMeans() for weights in models}
        n_samples = 0  # in this process
        finite_losses: list[tuple[list[int], Tensor]] = []  # a batch's samples, whether its losses are finite
        with self._whole(), evaluation_mode(self), torch.no_grad():
            for loaded in loader:
                n_samples += len(loaded.indices)
                batch = self.trainer.strategy.batch_to_device(loaded.batch)
                finite = []
                for weights, model in models.items():
                    with self.trainer.precision_plugin.val_step_context():
                        losses = self.task.validation_step(model, batch, self.val_metrics[weights])
                    means[weights].add(losses or {}, len(loaded.indices))
                    finite += [value.isfinite().all() for value in (losses or {}).values()]
                if finite:
                    finite_losses.append((loaded.indices, torch.stack(finite).all()))
                after_batch()
            if not sum(gather(n_samples)):
                raise DataError(
                    f"not one sample can be read, the first: {next(iter(loader.skipped), 'none')}"
                )
            results: dict[str, float] = {}
            for weights, metrics in self.val_metrics.items():
                prefix = "val/" if weights == "raw" else f"val/{weights}_"
                for name, value in {**means[weights].means(), **scores(metrics.compute())}.items():
                    results[f"{prefix}{name}"] = value
                metrics.reset()
        self._check_evaluation(results, finite_losses, loader.samples)
        return results

    def _broadcast_buffers(self) -> None:
        """Copy the first process' buffers, such as BatchNorm's running means, to all others."""
        if self.trainer.world_size > 1 and not isinstance(self.model, FSDPModule):
            for model in [self.model] if self.ema is None else [self.model, self.ema.module]:
                for buffer in model.buffers():
                    torch.distributed.broadcast(buffer, 0)

    def _check_evaluation(
        self,
        results: Mapping[str, float],
        finite_losses: Sequence[tuple[list[int], Tensor]],
        dataset: Any,
    ) -> None:
        if self.monitor not in results:
            expected = ", ".join(sorted(results))
            raise DataError(f"the evaluation gave no {self.monitor}, only {expected or 'nothing'}")
        good = bool(torch.stack([finite for _, finite in finite_losses]).all()) if finite_losses else True
        good = good and torch.tensor(results[self.monitor]).isfinite().item() is True
        if self.trainer.strategy.reduce_boolean_decision(good, all=True):
            return
        bad = [index for indices, finite in finite_losses if not finite for index in indices]
        names = [dataset.name(index) for index in bad[:3]]
        where = f", first for {', '.join(names)}" if names else ""
        message = (
            f"the evaluation after step {self.global_step} is not finite{where}: the model's outputs are NaN "
            "or infinite; lower optim.lr, or train in a wider precision"
        )
        if self.recipe.train.on_nonfinite == "raise":
            raise NonFiniteError(message)
        log.warning("%s", message)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return total_steps(self.recipe.schedule, self.steps_per_epoch)

    @property
    def monitor(self) -> str:
        """The score by which the best checkpoint is chosen: of the average where there is one."""
        return monitored(self.task, self.recipe)

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer(self.model, self.recipe.optim, self.task.parameter_groups)
        self._scheduler = create_scheduler(optimizer, self.recipe.schedule, self.steps_per_epoch)
        self._group_settings = [
            {key: value for key, value in group.items() if key not in ("params", "lr")}
            for group in optimizer.param_groups
        ]
        self._scheduler.step_update(self.global_step)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._scheduler, "interval": "step"},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop the schedule's state: it follows from the recipe, which may have been extended."""
        checkpoint["lr_schedulers"] = []

    def on_train_start(self) -> None:
        # The optimiser's state was restored with the old settings of its groups; the recipe's may be new.
        optimizer: Any = self.trainer.optimizers[0]
        for group, settings in zip(optimizer.param_groups, self._group_settings, strict=True):
            group.update(settings)
        self._scheduler.step_update(self.global_step)

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        scheduler.step_update(self.global_step)  # timm's schedulers take the number of updates

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONTENTS] = {
            "version": vmamba.__version__,
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": list(self.task.classes),
            **self.contents,
        }


def batchnorm_statistics(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers of a model's BatchNorm layers, each with a copy of its values."""
    layers = [module for module in model.modules() if isinstance(module, AnyBatchNorm)]
    return [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]


def monitored(task: Task | type[Task], recipe: Recipe) -> str:
    """The column of metrics.csv by which the best checkpoint is chosen."""
    return f"val/{'' if recipe.train.ema_decay is None else 'ema_'}{task.monitor}"


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and afterwards restore the mode of each submodule."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
