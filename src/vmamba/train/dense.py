"""What the recipes of detection and segmentation share: a backbone under a head, and its weights."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import timm
from pydantic import Field
from torch import nn

from vmamba.data import Preprocessing
from vmamba.data.dense import collate_dense
from vmamba.errors import CheckpointError, ModelError, RecipeError
from vmamba.heads import Features
from vmamba.heads.features import backbone_names
from vmamba.models.checkpoints import open_checkpoint
from vmamba.models.weights import load_weights
from vmamba.train.model import check_section, log_load, require_model
from vmamba.train.optim import Groups, parameter_groups
from vmamba.train.recipe import ModelRecipe, OptimRecipe
from vmamba.train.task import Task

log = logging.getLogger(__name__)


class DenseModelRecipe(ModelRecipe):
    """A backbone of timm's registry; a task adds the settings of its head."""

    norms: bool = Field(default=True, description="a LayerNorm on each feature map, as the paper has it")
    weights_of: Literal["auto", "backbone", "model"] = Field(
        default="auto",
        description="what to load of a file: the backbone, or the model with its head. 'auto' takes the "
        "whole model where the file holds one of this task",
    )


def configuration(recipe: ModelRecipe) -> Any:
    """timm's pretrained configuration of the backbone."""
    require_model(recipe.name)
    return timm.get_pretrained_cfg(recipe.name)


def create_backbone(recipe: DenseModelRecipe, in_chans: int) -> Features:
    """The backbone of a recipe, with timm's pretrained weights if it asks for them.

    Args:
        recipe: The section `model`.
        in_chans: Channels of the images.

    Raises:
        RecipeError: The model or an argument is unknown, or it has no maps at the strides 4 to 32.
        CheckpointError: The pretrained weights do not fit or cannot be read.
    """
    check_section(recipe)
    args: dict[str, Any] = {**recipe.args, "in_chans": in_chans}
    try:
        backbone = Features.create(
            recipe.name, pretrained=recipe.weights == "pretrained", norm=recipe.norms, **args
        )
    except ModelError as error:
        raise RecipeError(f"model: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"model.weights: {error}") from error
    if recipe.freeze == "backbone":
        backbone.model.requires_grad_(False)
    return backbone


def load_recipe_weights(
    model: nn.Module, backbone: Features, recipe: DenseModelRecipe, head_names: Sequence[str]
) -> None:
    """Load the file that a recipe's `model.weights` names, into the whole model or into its backbone.

    Args:
        model: The backbone with its head.
        backbone: The one in it.
        recipe: The section `model`.
        head_names: Beginnings of names by which a file of this task's models is known.

    Raises:
        CheckpointError: The file cannot be read or does not fit, or holds a backbone where the whole model is
            to be judged.
    """
    if recipe.weights is None or recipe.weights == "pretrained":
        return
    file = open_checkpoint(recipe.weights)
    names = file.state_dict(recipe.weights_kind)
    has_head = any(name.startswith(tuple(head_names)) for name in names)
    if recipe.weights_of == "model" or (recipe.weights_of == "auto" and has_head):
        classifier: Literal["new", "keep"] = "new" if recipe.new_classifier else "keep"
        report = load_weights(
            model, file, classifier=classifier, in_chans="convert", weights=recipe.weights_kind
        )
        log_load(report)
        return
    if not recipe.new_classifier:
        why = (
            "model.weights_of is 'backbone'"
            if has_head
            else "it holds a backbone without a head for this task"
        )
        raise CheckpointError(f"{file.path}: there is no whole model to judge, {why}")
    report = backbone.load(file, weights=recipe.weights_kind, in_chans="convert")
    log.info("%s: loaded into the backbone; the head starts anew", report.source)
    for name, how in report.converted.items():
        log.warning("%s: %s: %s", report.source, name, how)


FREE_OF_DECAY = ("norm", "absolute_pos_embed", "relative_position_bias_table")
"""With `optim.decay: paper`, what in a parameter's name frees it of weight decay."""


def dense_parameter_groups(model: nn.Module, optim: OptimRecipe) -> Groups:
    """The optimiser's groups of a backbone with a head.

    "clean" frees norms, biases and the scan's own parameters, as in classification. "paper" does what the
    authors' configurations do: free is what has "norm" in its name in their code. There the norms of stem and
    downsampling have an index for a name, and UPerNet's are called "bn": like biases, they are decayed.

    Args:
        model: Its backbone is a `Features`.
        optim: The section of the recipe.

    Raises:
        RecipeError: `optim.layer_decay` is set together with "paper", which knows no rates by layer.
    """
    if optim.decay == "clean":
        return parameter_groups(model, optim)
    if optim.layer_decay is not None:
        raise RecipeError("optim.layer_decay: not with optim.decay=paper; take clean, or set it to null")
    authors: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, Features):
            ours = dict(module.named_parameters())
            authors |= zip(map(id, ours.values()), backbone_names(ours), strict=True)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            known_as = authors.get(id(parameter), name)
            groups[any(part in known_as for part in FREE_OF_DECAY)].append(parameter)
    return [
        {"params": groups[True], "weight_decay": 0.0},
        {"params": groups[False], "weight_decay": optim.weight_decay},
    ]


def none_for_nan(value: float) -> float | None:
    """A score as JSON takes it: a class without objects or pixels has none."""
    return None if math.isnan(value) else value


class DenseTask(Task):
    """What detection and segmentation share: data, a backbone's weights, images judged one by one."""

    eval_batch_size = 1

    def __init__(self, recipe: Any, classes: Sequence[str] | None = None) -> None:
        self.recipe: Any = self.resolve(recipe)
        self.preprocessing: Preprocessing = self.recipe.data.preprocessing(configuration(recipe.model))
        self._sources: dict[str, Any] = {}
        self.classes = list(self._source("train").classes if classes is None else classes)

    @classmethod
    def resolve(cls, recipe: Any) -> Any:
        """Channels, mean and std from the backbone's pretrained configuration."""
        data = recipe.data.resolved(configuration(recipe.model))
        return recipe.model_copy(update={"data": data})

    @classmethod
    def without_training_data(cls, recipe: Any) -> Any:
        return recipe.model_copy(update={"data": recipe.data.without_training_split()})

    def _source(self, split: Literal["train", "val"]) -> Any:
        if split not in self._sources:
            self._sources[split] = self.recipe.data.open(split, self.preprocessing.decoding)
        return self._sources[split]

    def collate(self) -> Callable[[list[Any]], Any]:
        return collate_dense

    def warnings(self) -> list[str]:
        # A detector or segmenter that begins untrained reaches far lower scores by the same schedule.
        if self.recipe.model.weights is not None:
            return []
        return ["model.weights: none given, so the backbone starts anew; see docs/guides/dense.md"]

    def parameter_groups(self, model: nn.Module, optim: OptimRecipe) -> Groups:
        return dense_parameter_groups(model, optim)
