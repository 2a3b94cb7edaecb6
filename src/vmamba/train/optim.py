"""Parameter groups, optimiser and schedule, for a model that may be nested in a wrapper.

The methods by which a model describes its parameters (`no_weight_decay`, `group_matcher`, …) are called on
the submodule that defines them, and the names they return are prefixed with that submodule's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, muon, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vmamba.errors import RecipeError
from vmamba.nn import SS2D, VSSBlock
from vmamba.train.recipe import OptimRecipe, ScheduleRecipe

Groups = list[dict[str, Any]]


def outermost(model: nn.Module, attribute: str) -> Iterator[tuple[str, nn.Module]]:
    """Names and submodules with a method of that name, except those nested in another such submodule."""
    if callable(getattr(model, attribute, None)):
        yield "", model
        return
    for name, child in model.named_children():
        for below, module in outermost(child, attribute):
            yield f"{name}.{below}" if below else name, module


def names_free_of_decay(model: nn.Module, decay: str) -> set[str]:
    """Names, or patterns of names, of parameters without weight decay, besides biases and other vectors.

    Args:
        model: Of any kind.
        decay: "clean" frees a scan's A_log, D and dt_bias. "paper" frees D alone: the authors exempt 1-D
            tensors, and in their shapes only D is 1-D.
    """
    scan = {"A_log", "D", "dt_bias"}
    names = set()
    for prefix, module in model.named_modules():
        listed = getattr(module, "no_weight_decay", None)
        owned = set(listed()) if callable(listed) else set()
        if isinstance(module, SS2D):
            owned |= scan
        names |= {f"{prefix}.{name}" if prefix else name for name in owned}
    decayed = {"A_log", "dt_bias"} if decay == "paper" else set()
    return {name for name in names if name.rpartition(".")[2] not in decayed}


def parameter_groups(model: nn.Module, recipe: OptimRecipe) -> Groups:
    """The optimiser's groups, with `weight_decay` and, where rates differ by layer, `lr_scale`.

    Raises:
        RecipeError: The recipe asks for rates by layer, and several submodules have a `group_matcher`.
    """
    free = names_free_of_decay(model, recipe.decay)
    if recipe.layer_decay is None:
        return param_groups_weight_decay(model, recipe.weight_decay, no_weight_decay_list=free)
    layered = list(outermost(model, "group_matcher"))
    if len(layered) > 1:
        names = ", ".join(name for name, _ in layered)
        raise RecipeError(f"optim.layer_decay: {names} have layers of their own; set it to null")
    groups = partial(
        param_groups_layer_decay, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay
    )
    if not layered or layered[0][0] == "":  # without a matcher timm makes layers of twelve parameters each
        return groups(model, no_weight_decay_list=free)
    prefix, backbone = layered[0]
    within = {name.removeprefix(f"{prefix}.") for name in free if name.startswith(f"{prefix}.")}
    inner: Groups = groups(backbone, no_weight_decay_list=within)
    for group in inner:
        group["lr_scale"] *= recipe.layer_decay  # what surrounds the backbone is one layer more
    return inner + _rest(model, backbone, free, recipe.weight_decay)


def _rest(model: nn.Module, backbone: nn.Module, free: set[str], weight_decay: float) -> Groups:
    """Groups of the parameters outside of the backbone, at the full rate."""
    inside = {id(parameter) for parameter in backbone.parameters()}
    # timm's function goes through `named_parameters` alone, and matches names with patterns.
    outside = _Parameters({n: p for n, p in model.named_parameters() if id(p) not in inside})
    groups: Groups = param_groups_weight_decay(outside, weight_decay, no_weight_decay_list=free)
    return [{**group, "lr_scale": 1.0} for group in groups]


class _Parameters(nn.Module):
    """Some of a model's parameters under the names that they have there."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self._named = parameters

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._named.items()


def create_optimizer(
    model: nn.Module,
    recipe: OptimRecipe,
    groups: Callable[[nn.Module, OptimRecipe], Groups] = parameter_groups,
) -> torch.optim.Optimizer:
    """timm's optimiser of that name.

    Args:
        model: Whose parameters it moves.
        recipe: The section `optim`.
        groups: Parameter groups from the model and the section.

    Raises:
        RecipeError: The optimiser does not take the recipe's values.
    """
    try:
        return create_optimizer_v2(
            model,
            opt=recipe.name,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            betas=recipe.betas,
            param_group_fn=lambda model: groups(model, recipe),
        )
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"optim: {recipe.name} does not take these values: {error}") from error


def base_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of a layer whose rate is not scaled down."""
    return max(group["lr"] / group.get("lr_scale", 1.0) for group in optimizer.param_groups)


def total_steps(schedule: ScheduleRecipe, steps_per_epoch: int) -> int:
    """Steps of the whole run."""
    if schedule.epochs is not None:
        return schedule.epochs * steps_per_epoch
    assert schedule.steps is not None
    return schedule.steps


def warmup_steps(schedule: ScheduleRecipe, steps_per_epoch: int) -> int:
    """Steps of the warm-up, fewer than the run has."""
    steps = total_steps(schedule, steps_per_epoch)
    if schedule.warmup_epochs is None:
        assert schedule.warmup_steps is not None
        return min(steps - 1, schedule.warmup_steps)
    if schedule.epochs is None:
        return min(steps - 1, round(steps_per_epoch * schedule.warmup_epochs))
    return min(steps - 1, round(steps * schedule.warmup_epochs / schedule.epochs))


def create_scheduler(
    optimizer: torch.optim.Optimizer, schedule: ScheduleRecipe, steps_per_epoch: int
) -> Scheduler:
    """The learning rate as a function of the number of steps done, for timm's `step_update`."""
    steps = total_steps(schedule, steps_per_epoch)
    warmup = warmup_steps(schedule, steps_per_epoch)
    common: dict[str, Any] = {
        "warmup_t": warmup,
        "warmup_lr_init": schedule.warmup_lr,
        "t_in_epochs": False,
    }
    if schedule.name == "multistep":
        unit = 1 if schedule.epochs is None else steps_per_epoch
        # timm compares milestones with t + 1, so the rate would fall one update early.
        milestones = [round(milestone * unit) + 1 for milestone in schedule.milestones]
        return MultiStepLRScheduler(optimizer, milestones, schedule.gamma, warmup_prefix=False, **common)
    # The curve begins after the warm-up.
    curve: dict[str, Any] = {"t_initial": steps - warmup, "lr_min": schedule.min_lr, "warmup_prefix": True}
    if schedule.name == "polynomial":
        return PolyLRScheduler(optimizer, power=schedule.power, **curve, **common)
    return CosineLRScheduler(optimizer, **curve, **common)


def enable_grad_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass, in each submodule that supports it.

    Raises:
        RecipeError: No submodule supports it.
    """
    able = list(outermost(model, "set_grad_checkpointing"))
    if not able:
        raise RecipeError(f"train.grad_checkpointing: {type(model).__name__} has no set_grad_checkpointing")
    for _, module in able:
        module.set_grad_checkpointing(True)  # type: ignore[operator]


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """The blocks that FSDP gathers one at a time.

    VSS blocks, and the classes that a submodule names in `_no_split_modules`, as Hugging Face's models do.
    """
    named = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [
        module for module in model.modules() if isinstance(module, VSSBlock) or type(module).__name__ in named
    ]


@contextmanager
def muon_in_float32() -> Iterator[None]:
    """Make timm's Muon compute updates in float32: it is fixed to bfloat16, which most CPUs only emulate."""
    original = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(original, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = original
