"""From a recipe's `model` section to a model."""

import logging
from typing import Any

import timm
from torch import nn

from vmamba.errors import CheckpointError, ModelError, RecipeError
from vmamba.models import factory
from vmamba.models.weights import LoadReport, load_weights
from vmamba.train.recipe import ModelRecipe
from vmamba.words import counted

log = logging.getLogger(__name__)

_NOT_ARGS = {
    "num_classes": "the data say how many classes there are",
    "in_chans": "set data.channels",
    "img_size": "set data.image_size",
    "features_only": "the task needs the whole model",
    "pretrained": "set model.weights=pretrained",
    "checkpoint_path": "set model.weights",
    "device": "set train.accelerator",
    "dtype": "set train.precision",
}
"""Arguments of a model that are set by another key of the recipe, and by which."""


def require_model(name: str) -> None:
    """Check that timm's registry has a model of this name.

    Raises:
        RecipeError: It has not; close names are listed.
    """
    try:
        factory.check_name(name)
    except ModelError as error:
        raise RecipeError(f"model.name: {error}") from error


def check_section(recipe: ModelRecipe) -> None:
    """Check a recipe's section before a model is created from it.

    Raises:
        RecipeError: The model is unknown, or an argument of it is set by another key.
    """
    require_model(recipe.name)
    for name in recipe.args:
        if name in _NOT_ARGS:
            raise RecipeError(f"model.args.{name}: not here; {_NOT_ARGS[name]}")


def create_model(
    recipe: ModelRecipe,
    *,
    num_classes: int,
    in_chans: int = 3,
    image_size: tuple[int, int] | None = None,
    **defaults: Any,
) -> nn.Module:
    """A classifier of timm's registry, by a recipe's section.

    Args:
        recipe: Its `args` win over `defaults`.
        num_classes: Of the classifier.
        in_chans: Channels of the images.
        image_size: (height, width) of the images.
        defaults: Further arguments of the model.

    Raises:
        RecipeError: The model or one of its arguments is unknown, or it does not work with them.
        CheckpointError: `weights` does not fit or cannot be read.
    """
    check_section(recipe)
    pretrained = recipe.weights == "pretrained"
    cfg = timm.get_pretrained_cfg(recipe.name) if pretrained else None
    pretrained_classes = num_classes if cfg is None else cfg.num_classes
    # With another number of classes than its weights' timm loads non-strictly and hides missing weights.
    arguments: dict[str, Any] = {**defaults, **recipe.args, "in_chans": in_chans}
    arguments["num_classes"] = pretrained_classes
    try:
        model: Any = factory.create_model(
            recipe.name,
            pretrained=pretrained,
            image_size=image_size,
            logits=pretrained_classes,
            **arguments,
        )
    except ModelError as error:
        raise RecipeError(f"model.args: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"model.weights: {error}") from error
    if pretrained_classes != num_classes:
        _new_classifier(model, recipe, pretrained_classes, num_classes)
    if recipe.weights is not None and not pretrained:
        _load(model, recipe)
    if recipe.freeze == "backbone":
        model.eval().requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model


def _new_classifier(model: Any, recipe: ModelRecipe, pretrained: int, classes: int) -> None:
    """Replace the classifier of a pretrained model by an untrained one, if the recipe permits it."""
    number = counted(pretrained, "class", "classes")
    difference = f"{recipe.name}: the pretrained classifier is for {number}, the model's for {classes}"
    if not recipe.new_classifier:
        raise CheckpointError(difference)
    log.warning("%s: it starts anew", difference)
    model.reset_classifier(classes)


def _load(model: nn.Module, recipe: ModelRecipe) -> None:
    assert recipe.weights is not None
    log_load(
        load_weights(
            model,
            recipe.weights,
            classifier="new" if recipe.new_classifier else "keep",
            in_chans="convert",
            weights=recipe.weights_kind,
        )
    )


def log_load(report: LoadReport) -> None:
    """Log which weights the file lacked, so that the initial ones stay, and which were converted."""
    if report.missing:
        log.warning("%s: the classifier starts anew: %s", report.source, ", ".join(report.missing))
    for name, how in report.converted.items():
        log.warning("%s: %s: %s", report.source, name, how)
