"""Parameter groups of models in wrappers, and learning rates step by step."""

from typing import Any

import pytest
import timm
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from vmamba import SS2D, VMamba
from vmamba.errors import RecipeError
from vmamba.nn import VSSBlock
from vmamba.train.optim import (
    base_rate,
    create_optimizer,
    create_scheduler,
    enable_grad_checkpointing,
    parameter_groups,
    sharding_units,
    total_steps,
)
from vmamba.train.recipe import OptimRecipe, ScheduleRecipe

SCAN = {"A_log", "D", "dt_bias"}


def vmamba() -> VMamba:
    return VMamba(num_classes=5, depths=(1, 2), dims=(8, 16))


class Wrapper(nn.Module):
    """A user's own: it says nothing of its parameters."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(modules)
        self.neck = nn.Linear(16, 3)


def decays(model: nn.Module, optim: OptimRecipe) -> dict[str, float]:
    of = {id(p): group["weight_decay"] for group in parameter_groups(model, optim) for p in group["params"]}
    return {name: of[id(parameter)] for name, parameter in model.named_parameters()}


MODELS = {
    "plain": vmamba,
    "wrapped": lambda: Wrapper(backbone=vmamba()),
    "wrapped twice": lambda: nn.Sequential(Wrapper(a=Wrapper(b=vmamba()))),
    "features": lambda: Wrapper(f=timm.create_model("vmamba_pico", features_only=True)),
    "a layer": lambda: Wrapper(ss2d=SS2D(16)),
    "a block": lambda: nn.Sequential(VSSBlock(16), VSSBlock(16, routes="cascade")),
}


@pytest.mark.parametrize("decay", ["clean", "paper"])
@pytest.mark.parametrize("name", MODELS)
def test_the_scans_parameters_do_not_decay(name: str, decay: Any) -> None:
    free = SCAN if decay == "clean" else {"D"}
    model = MODELS[name]()
    actual = decays(model, OptimRecipe(weight_decay=0.1, decay=decay))
    assert {key.rpartition(".")[2] for key in actual} >= SCAN
    for key, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or key.rpartition(".")[2] in free
        assert actual[key] == (0 if exempt else 0.1), key


def test_what_another_model_exempts_is_exempt_inside_a_wrapper() -> None:
    actual = decays(Wrapper(vit=timm.create_model("test_vit")), OptimRecipe(weight_decay=0.1))
    assert actual["inner.vit.pos_embed"] == actual["inner.vit.cls_token"] == 0
    assert actual["inner.vit.patch_embed.proj.weight"] == actual["neck.weight"] == 0.1


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("decay", ["clean", "paper"])
def test_a_plain_model_has_timms_groups(decay: Any, layer_decay: float | None) -> None:
    model = vmamba()
    optim = OptimRecipe(weight_decay=0.1, decay=decay, layer_decay=layer_decay)
    free = model.no_weight_decay()
    if decay == "paper":
        free = {name for name in free if name.endswith(".D")}
    if layer_decay is None:
        expected = param_groups_weight_decay(model, 0.1, no_weight_decay_list=free)
    else:
        expected = param_groups_layer_decay(
            model, weight_decay=0.1, no_weight_decay_list=free, layer_decay=layer_decay
        )
    actual = parameter_groups(model, optim)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]]
        assert {k: v for k, v in one.items() if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }


def test_layers_of_two_models() -> None:
    with pytest.raises(RecipeError, match=r"optim.layer_decay: inner\.a, inner\.b have layers of their own"):
        parameter_groups(Wrapper(a=vmamba(), b=vmamba()), OptimRecipe(layer_decay=0.5))


def test_gradient_checkpointing_and_blocks_inside_a_wrapper() -> None:
    model = Wrapper(backbone=vmamba())
    enable_grad_checkpointing(model)
    assert any(getattr(module, "grad_checkpointing", False) for module in model.modules())
    assert len(sharding_units(model)) == 3
    with pytest.raises(RecipeError, match="grad_checkpointing: Linear has no set_grad_checkpointing"):
        enable_grad_checkpointing(nn.Linear(2, 2))


class Declares(nn.Module):
    _no_split_modules = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Conv2d(1, 1, 1)


def test_blocks_that_a_model_declares() -> None:
    model = Wrapper(declared=Declares())
    assert sharding_units(model) == [model.inner["declared"].one, model.inner["declared"].two, model.neck]


def rates(schedule: ScheduleRecipe, steps_per_epoch: int, layer_decay: float | None = None) -> list[float]:
    optimizer = create_optimizer(vmamba(), OptimRecipe(lr=1e-2, layer_decay=layer_decay))
    scheduler = create_scheduler(optimizer, schedule, steps_per_epoch)
    actual = []
    for step in range(total_steps(schedule, steps_per_epoch)):
        scheduler.step_update(step)
        actual.append(base_rate(optimizer))
    return actual


@pytest.mark.parametrize(("epochs", "warmup"), [(300, 20), (3, 1), (7, 0.5), (1, 0)])
def test_cosine_over_epochs(epochs: int, warmup: float) -> None:
    """To the last bit as timm's schedule has it when it is set up by hand."""
    steps = 13 * epochs
    optimizer = create_optimizer_v2(vmamba(), opt="adamw", lr=1e-2)
    begin = min(steps - 1, round(steps * warmup / epochs))
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=steps - begin,
        lr_min=5e-6,
        warmup_t=begin,
        warmup_lr_init=5e-7,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    expected = []
    for step in range(steps):
        scheduler.step_update(step)
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(ScheduleRecipe(epochs=epochs, warmup_epochs=float(warmup)), 13) == expected


def test_polynomial_over_steps() -> None:
    actual = rates(
        ScheduleRecipe(name="polynomial", steps=10, warmup_steps=4, warmup_lr=0.0, min_lr=0.0, power=2.0), 3
    )
    expected = [0.01 * t / 4 for t in range(4)] + [0.01 * (1 - t / 6) ** 2 for t in range(6)]
    assert actual == pytest.approx(expected)


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleRecipe(name="multistep", steps=12, warmup_steps=2, milestones=[6.0, 9.0], warmup_lr=0.0),
        ScheduleRecipe(name="multistep", epochs=4, warmup_steps=2, milestones=[2.0, 3.0], warmup_lr=0.0),
    ],
    ids=["steps", "epochs"],
)
def test_the_rate_falls_behind_each_milestone(schedule: ScheduleRecipe) -> None:
    expected = [0, 0.005, *[0.01] * 4, *[0.001] * 3, *[0.0001] * 3]
    assert rates(schedule, 3) == pytest.approx(expected)


def test_the_base_rate_is_the_recipes_with_rates_by_layer() -> None:
    schedule = ScheduleRecipe(epochs=4, warmup_epochs=1.0)
    assert rates(schedule, 3, layer_decay=0.3) == pytest.approx(rates(schedule, 3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 3, "steps": 9}, "epochs 3 and steps 9: give one of them"),
        ({"warmup_epochs": 1.0, "warmup_steps": 9}, "warmup_epochs 1.0 and warmup_steps 9: give one"),
        ({"steps": 9, "warmup_steps": 9}, "warmup_steps 9 is not below steps 9"),
        ({"name": "multistep"}, "milestones: missing"),
        ({"milestones": [3.0]}, "milestones: only 'multistep' has them"),
        (
            {"name": "multistep", "steps": 9, "milestones": [3.0, 9.0]},
            r"between 0 and schedule.steps \(9\), got \[3, 9\]",
        ),
        (
            {"name": "multistep", "epochs": 1, "warmup_epochs": 0.0, "milestones": [8.0, 11.0]},
            r"between 0 and schedule.epochs \(1\), got \[8, 11\]",
        ),
    ],
)
def test_schedules_that_contradict_themselves(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleRecipe(**values)


def test_default_lengths() -> None:
    assert (ScheduleRecipe().epochs, ScheduleRecipe().warmup_epochs) == (300, 20)
    of_steps = ScheduleRecipe(steps=100)
    assert (of_steps.epochs, of_steps.warmup_epochs, of_steps.warmup_steps) == (None, None, 0)
    assert total_steps(of_steps, 7) == 100
