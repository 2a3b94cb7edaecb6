"""The one Lightning module: it trains and evaluates any task."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import lightning
import torch
from timm.optim import create_optimizer_v2, muon, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import vmamba
from vmamba.data import LoadedBatch, SampleKey, draw_seed, seeded
from vmamba.models.checkpoints import CONTENTS
from vmamba.nn import VSSBlock
from vmamba.train.guard import NonFiniteError, first_nonfinite
from vmamba.train.recipe import Recipe
from vmamba.train.task import Task

MOST_SKIPPED = 10
"""So many steps in a row without a finite gradient are not an accident any more."""

MOST_SCALED = 40
"""The same where a loss scaler looks for its scale, halving it each time."""

log = logging.getLogger(__name__)


class TaskModule(lightning.LightningModule):
    """A task, its recipe and its model, in Lightning's loop.

    What a step draws for its batch (Mixup) is a function of (seed, epoch, step), the same on every process,
    and what the model draws (drop path) of (seed, step, rank): a checkpoint needs no random state.

    Args:
        task: What is trained.
        recipe: Of the task.
        model: From the task.
        steps: Of the whole run, for the schedule. Lightning's own estimate would set up the data before the
            checkpoint is read, and leave the loader's state in it unread.

    Attributes:
        ema: The average of the model's weights, where the recipe asks for one.
        skipped_steps: Of this process' run, those left out for a gradient that was not finite.
    """

    def __init__(self, task: Task, recipe: Recipe, model: nn.Module, steps: int = 1) -> None:
        super().__init__()
        self.task, self.recipe, self.model, self.steps = task, recipe, model, steps
        self.val_metrics: Any = nn.ModuleDict({"raw": task.metrics()})
        self.ema: ModelEmaV3 | None = None
        if recipe.train.ema_decay is not None:
            self.ema = ModelEmaV3(model, recipe.train.ema_decay, use_warmup=recipe.train.ema_warmup)
            self.ema.requires_grad_(False)
            self.val_metrics["ema"] = task.metrics()
        if recipe.train.compile:
            self.model.compile()
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._step_parts: list[tuple[int, list[int]]] = []  # batch number and samples of the step so far
        self._finite: Tensor | None = None

    def configure_model(self) -> None:
        """Shard the model, block by block, and the average alike, where the strategy is FSDP."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        for model in [self.model] if self.ema is None else [self.model, self.ema.module]:
            for module in model.modules():
                if isinstance(module, VSSBlock):
                    fully_shard(module, mesh=self.device_mesh["data_parallel"])
            fully_shard(model, mesh=self.device_mesh["data_parallel"])

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self._gather(True)

    def on_validation_model_train(self) -> None:
        self._gather(False)
        super().on_validation_model_train()

    def _gather(self, whole: bool) -> None:
        """Hold shards as a whole model while it is judged: processes may have another number of batches."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(not whole, recurse=False)
                if whole:
                    module.unshard()
                else:
                    module.reshard()

    def train(self, mode: bool = True) -> "TaskModule":
        """Set the mode; a frozen model keeps that of evaluation: its features stay the same at every step."""
        super().train(mode)
        if self.recipe.model.freeze is not None:
            self.model.eval()
        return self

    def training_step(self, loaded: LoadedBatch, batch_idx: int) -> Tensor:
        # A checkpoint is taken between steps: there, what this step reads is done.
        loader: Any = self.trainer.train_dataloader
        loader.consumed = (batch_idx + 1) * loader.batch_size * self.trainer.world_size
        self._step_parts.append((batch_idx, loaded.indices))
        losses = self._losses(loaded.batch, batch_idx)
        loss = losses["loss"]
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        for name, value in losses.items():
            self.log(
                f"train/{name}_step",
                value.detach(),
                prog_bar=True,
                on_step=True,
                batch_size=loader.batch_size,
            )
            self.log(
                *(f"train/{name}", value.detach()),
                on_step=False,
                on_epoch=True,
                sync_dist=self.trainer.world_size > 1,
                batch_size=loader.batch_size,
            )
        return loss

    def _losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        seed = self.recipe.train.seed
        with self._drawing(
            "mix", seed, self.current_epoch, batch_idx // self.trainer.accumulate_grad_batches
        ):
            batch = self.task.mix(batch)
        with self._drawing("step", seed, self.global_step, batch_idx, self.global_rank):
            return self.task.loss(self.model, batch)

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
        """Clip the gradient's norm; a step without a finite one is left out, or ends the run."""
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
            optimizer.zero_grad()  # before the diagnosis, which needs the memory; without gradients no step
            self._report_nonfinite("gradient" if loss_finite else "loss")
            self._skipped_in_a_row += 1
            self.skipped_steps += 1
        most = MOST_SCALED if scaled and loss_finite else MOST_SKIPPED
        if self._skipped_in_a_row >= most:
            raise NonFiniteError(
                f"{most} steps in a row without a finite gradient, till step {self.global_step + 1}: "
                "lower optim.lr, or train in a wider precision"
            )

    def _report_nonfinite(self, what: str) -> None:
        """Look for the layer in the step's samples, which are read again: nothing was kept of them."""
        loader: Any = self.trainer.train_dataloader
        data = loader.dataset.dataset
        source, names = "", []
        for batch_idx, indices in self._step_parts:
            mine = [data.name(index) for index in indices]
            names += mine
            if isinstance(self.model, FSDPModule):
                source = "not looked for in a model in shards"
                continue
            samples = [data[SampleKey(self.current_epoch, index)] for index in indices]
            batch = self.trainer.strategy.batch_to_device(loader.collate_fn.collate(samples))
            with torch.compiler.set_stance("force_eager"), self.trainer.precision_plugin.forward_context():
                source = first_nonfinite(self.model, batch, partial(self._loss, batch, batch_idx))
            if not source.startswith("nothing"):
                names = mine
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
        with _muon_in_float32() if emulated else nullcontext():
            super().optimizer_step(*args, **kwargs)
        self._step_parts, self._finite = [], None
        if self.ema is not None:
            # Given the step, timm starts with a copy of the weights behind the first one.
            self.ema.update(self.model, step=self.global_step if self.recipe.train.ema_warmup else None)

    def validation_step(self, loaded: LoadedBatch, batch_idx: int) -> None:
        self.task.evaluate(self.model, loaded.batch, self.val_metrics["raw"])
        if self.ema is not None:
            self.task.evaluate(self.ema.module, loaded.batch, self.val_metrics["ema"])

    def on_validation_epoch_end(self) -> None:
        for weights, metrics in self.val_metrics.items():
            prefix = "" if weights == "raw" else f"{weights}_"
            for name, value in metrics.compute().items():
                self.log(f"val/{prefix}{name}", value, prog_bar=f"{prefix}{name}" == self.monitor)
            metrics.reset()

    @property
    def monitor(self) -> str:
        """The score by which the best checkpoint is chosen: of the average where there is one."""
        return self.task.monitor if self.ema is None else f"ema_{self.task.monitor}"

    def configure_optimizers(self) -> Any:
        optim, schedule = self.recipe.optim, self.recipe.schedule
        free: set[str] = set(getattr(self.model, "no_weight_decay", set)())
        if optim.decay == "paper":  # it decays what is of two dimensions with the authors: all but D
            free = {name for name in free if name.rpartition(".")[2] not in ("A_log", "dt_bias")}
        groups: Any = partial(param_groups_weight_decay, no_weight_decay_list=free)
        if optim.layer_decay is not None:
            groups = partial(
                param_groups_layer_decay, no_weight_decay_list=free, layer_decay=optim.layer_decay
            )
        optimizer = create_optimizer_v2(
            self.model,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            param_group_fn=partial(groups, weight_decay=optim.weight_decay),
        )
        warmup = min(self.steps - 1, round(self.steps * schedule.warmup_epochs / schedule.epochs))
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=self.steps - warmup,
            lr_min=schedule.min_lr,
            warmup_t=warmup,
            warmup_lr_init=schedule.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        scheduler.step_update(self.global_step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        scheduler.step_update(self.global_step)  # timm's count updates, not calls

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONTENTS] = {
            "version": vmamba.__version__,
            "recipe": self.recipe.model_dump(mode="json"),
            "classes": list(self.task.classes),
        }


@contextmanager
def _muon_in_float32() -> Iterator[None]:
    """timm's Muon forms its updates in bfloat16 and takes no other type; most CPUs only emulate that."""
    original = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(original, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = original
