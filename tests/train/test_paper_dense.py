"""The recipes of detection and segmentation hold the paper's settings (arXiv 2401.10166, 5.2 and 5.3)."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vmamba.train.optim import create_scheduler, total_steps
from vmamba.train.session import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
DETECTION = sorted((RECIPES / "detection").glob("*_[13]x.yaml"))
SMALL = {"shapes", "overfit"}
SEGMENTATION = sorted(path for path in (RECIPES / "segmentation").glob("*.yaml") if path.stem not in SMALL)
DROP_PATH = {"vmamba_tiny": 0.2, "vmamba_small": 0.3, "vmamba_base": 0.6}


def test_every_model_has_its_recipes() -> None:
    models = {"vmamba_tiny", "vmamba_small", "vmamba_base", "swin_tiny", "convnext_tiny", "resnet50"}
    assert {path.stem for path in DETECTION} == {
        f"{name}_{length}" for name in models for length in ("1x", "3x")
    }
    assert {path.stem for path in SEGMENTATION} == models


def rates(recipe: Any, steps_per_epoch: int, steps: list[int]) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.optim.lr)
    scheduler = create_scheduler(optimizer, recipe.schedule, steps_per_epoch)
    rates = []
    for step in steps:
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("path", DETECTION, ids=lambda path: path.stem)
def test_detection(path: Path) -> None:
    recipe: Any = load_recipe(path)
    optim, train, augment = recipe.optim, recipe.train, recipe.augment
    assert (optim.name, optim.betas, optim.decay) == ("adamw", (0.9, 0.999), "paper")
    assert (optim.weight_decay, optim.clip_grad, train.batch_size) == (0.05, None, 16)
    epochs, stones = (12, [8, 11]) if path.stem.endswith("1x") else (36, [27, 33])
    assert total_steps(recipe.schedule, 7330) == epochs * 7330
    # mmdet warms up over 1,000 iterations from a thousandth of the rate, and divides by 10 at two epochs.
    first, second = (stone * 7330 for stone in stones)
    steps = [0, 500, 1000, first - 1, first, second - 1, second]
    expected = [1e-7, 1e-4 * (0.001 + 0.999 / 2), 1e-4, 1e-4, 1e-5, 1e-5, 1e-6]
    assert rates(recipe, 7330, steps) == pytest.approx(expected, rel=1e-6)
    assert (augment.hflip, recipe.data.short_side, recipe.data.long_side) == (0.5, 800, 1333)
    if path.stem.endswith("1x"):
        assert (augment.short_sides, augment.crop_probability) == ([800], 0.0)
    else:
        assert (augment.short_sides, augment.crop_probability) == (list(range(480, 801, 32)), 0.5)
        assert (augment.crop_short_sides, augment.crop_size) == ([400, 500, 600], (384, 600))
    check_model(recipe)


@pytest.mark.parametrize("path", SEGMENTATION, ids=lambda path: path.stem)
def test_segmentation(path: Path) -> None:
    recipe: Any = load_recipe(path)
    optim, train, augment = recipe.optim, recipe.train, recipe.augment
    assert (optim.name, optim.betas, optim.decay) == ("adamw", (0.9, 0.999), "paper")
    assert (optim.weight_decay, optim.clip_grad, train.batch_size) == (0.01, None, 16)
    assert train.sync_batchnorm
    assert total_steps(recipe.schedule, 1263) == 160_000
    middle = 1500 + (160_000 - 1500) // 2
    expected = [6e-5 * 1e-6, 6e-5 / 2, 6e-5, 3e-5, 0.0]
    assert rates(recipe, 1263, [0, 750, 1500, middle, 160_000]) == pytest.approx(expected, rel=1e-5)
    assert (augment.base_size, augment.scale, augment.crop) == ((512, 2048), (0.5, 2.0), 512)
    assert (augment.cat_max_ratio, augment.hflip, augment.photometric) == (0.75, 0.5, True)
    model = recipe.model
    assert (model.channels, model.aux_channels, model.aux_weight, model.dropout) == (512, 256, 0.4, 0.1)
    assert (recipe.data.short_side, recipe.data.long_side, recipe.data.window) == (512, 2048, None)
    check_model(recipe)


def check_model(recipe: Any) -> None:
    assert recipe.model.weights == "pretrained"
    if recipe.model.name in DROP_PATH:
        assert recipe.model.args == {"drop_path_rate": DROP_PATH[recipe.model.name]}
        assert recipe.model.norms


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_the_first_try_needs_no_data(task: str) -> None:
    recipe: Any = load_recipe(RECIPES / task / "shapes.yaml")
    assert (recipe.data.source, recipe.data.root, recipe.model.weights) == ("shapes", None, None)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_what_is_learned_by_heart_is_what_judges(task: str) -> None:
    recipe: Any = load_recipe(RECIPES / task / "overfit.yaml")
    assert recipe.data.val_split == recipe.data.train_split
    if task == "detection":
        assert recipe.data.val_annotations == recipe.data.train_annotations
    assert recipe.augment.hflip == 0
