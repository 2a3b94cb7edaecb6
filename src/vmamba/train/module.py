"""The one Lightning module: it trains and evaluates any task."""

from typing import Any

import lightning
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

import vmamba
from vmamba.data import draw_seed, seeded
from vmamba.train.checkpoint import CONTENTS
from vmamba.train.recipe import Recipe
from vmamba.train.task import Task


class TaskModule(lightning.LightningModule):
    """A task, its recipe and its model, in Lightning's loop.

    What a step draws (Mixup, drop path) is a function of (seed, step, rank), so that a checkpoint needs no
    random state.

    Args:
        task: What is trained.
        recipe: Of the task.
        model: From the task.
        steps: Of the whole run, for the schedule. Lightning's own estimate would set up the data before the
            checkpoint is read, and leave the loader's state in it unread.
    """

    def __init__(self, task: Task, recipe: Recipe, model: nn.Module, steps: int = 1) -> None:
        super().__init__()
        self.task, self.recipe, self.model, self.steps = task, recipe, model, steps
        self.val_metrics = task.metrics()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        train = self.recipe.train
        # A checkpoint is taken between steps: there, what this step reads is done.
        loader: Any = self.trainer.train_dataloader
        loader.consumed = (batch_idx + 1) * train.batch_size * self.trainer.world_size
        counters = ("step", train.seed, self.global_step, batch_idx, self.global_rank)
        with seeded(*counters):
            if self.device.type != "cpu":
                torch.manual_seed(draw_seed(*counters))
            losses = self.task.loss(self.model, batch.batch)
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in losses.items()},
            prog_bar=True,
            on_step=True,
            on_epoch=True,
            batch_size=train.batch_size,
        )
        return losses["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.task.evaluate(self.model, batch.batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.val_metrics.compute().items():
            self.log(f"val/{name}", value, prog_bar=name == self.task.monitor)
        self.val_metrics.reset()

    def configure_optimizers(self) -> Any:
        optim, schedule = self.recipe.optim, self.recipe.schedule
        optimizer = create_optimizer_v2(
            self.model,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            betas=optim.betas,
            layer_decay=optim.layer_decay,
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
