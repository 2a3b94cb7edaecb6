"""The best weights of a run, in the form that timm and `vmamba.load` read."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from vmamba.errors import OutputError
from vmamba.models.checkpoints import CONTENTS, open_checkpoint
from vmamba.pretrained import CLASSIFICATION, model_config, save_pretrained
from vmamba.train.task import Task


def describe_model(task: Task, model: nn.Module) -> dict[str, Any]:
    """What config.json says of a run's model."""
    recipe = task.recipe
    section, size = recipe.model, task.preprocessing.size
    arguments: dict[str, Any] = dict(section.args)
    cfg = timm.get_pretrained_cfg(section.name) if timm.is_model(section.name) else None
    if cfg is not None and cfg.fixed_input_size and tuple(cfg.input_size[1:]) != size:
        arguments.setdefault("img_size", list(size))
    whole = task.name != CLASSIFICATION  # timm cannot build other tasks' models, the task can
    return model_config(
        model,
        task.preprocessing,
        task.classes,
        task=task.name,
        model_args=arguments,
        recipe=recipe.model_dump(mode="json") if whole else None,
        category_ids=task.category_ids,
    )


def write_best(checkpoint: Path, config: dict[str, Any], model: nn.Module, folder: Path) -> None:
    """Write best.safetensors and config.json.

    Args:
        checkpoint: Of the run; its averaged weights are used if it has them.
        config: From `describe_model`.
        model: The model that the weights are for.
        folder: Of the run.

    Raises:
        OutputError: A file cannot be written.
    """
    opened = open_checkpoint(checkpoint)
    ours = {**config[CONTENTS], "weights": opened.kind()}
    weights: Any = opened.state_dict()
    try:
        save_pretrained(folder, model, {**config, CONTENTS: ours}, state_dict=weights)
    except OSError as error:
        raise OutputError(f"{folder}/best.safetensors: could not be written ({error})") from error
