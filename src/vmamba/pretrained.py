"""A trained model and its preprocessing: restored from a checkpoint, or saved so that timm reads it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import CheckpointError, ModelError
from vmamba.files import replacing, write_atomically
from vmamba.models import model_names
from vmamba.models.checkpoints import CONFIG, CONTENTS, Checkpoint, Place, Weights, expand, state_digest
from vmamba.models.factory import check_name, create_model, create_on_meta
from vmamba.models.weights import fits, load_weights

CLASSIFICATION = "classification"
"""The task whose models timm creates from their name and arguments; others are created from a recipe."""

BEST = "best.safetensors"
"""The file in a run's folder with its best weights; `config.json` beside it says of which model."""


def task_of(checkpoint: Checkpoint) -> Any:
    """The name of the task that a checkpoint's model was trained for."""
    if checkpoint.recipe is not None:
        return checkpoint.recipe.get("task")
    extra = (checkpoint.config or {}).get(CONTENTS) or {}
    return extra.get("task", CLASSIFICATION)


def is_dense(state_dict: Mapping[str, Any]) -> bool:
    """Whether a file's weights are of a detector or a segmenter, by their names in mmdet, mmseg and here."""
    heads = ("roi_head.", "roi_heads.", "decode_head.")
    return any(name.removeprefix("module.").startswith(heads) for name in state_dict)


def restore(
    checkpoint: Checkpoint, name: str | None, weights: Weights, *, trained: bool = True
) -> tuple[nn.Module, Preprocessing, list[str]]:
    """Rebuild a classifier from its checkpoint.

    Args:
        checkpoint: A run's, or a file of weights.
        name: The model's name, for a file that does not contain it.
        weights: Which of the checkpoint's weights to load.
        trained: False leaves the weights as the architecture draws them.

    Returns:
        The model with its weights, its preprocessing and the names of its classes.

    Raises:
        CheckpointError: Its configuration or recipe is damaged, or its weights do not fit the model.
        ModelError: The model's name is unknown, must be given, or is not the one that the file names.
    """
    config = checkpoint.config
    if checkpoint.recipe is not None and config is None:
        config = _config_of_recipe(checkpoint)
    if config is None:
        return _of_bare_weights(checkpoint, name, weights, trained)
    architecture = config["architecture"]
    if name is not None and name.partition(".")[0] != architecture:
        raise ModelError(f"model: {checkpoint.path} is of {architecture}, not of {name}")
    try:
        cfg = {**(config.get("pretrained_cfg") or {}), "architecture": architecture}
        preprocessing = _preprocessing(config, cfg)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.path}: its configuration is damaged ({error})") from error
    number = config.get("num_classes", len(checkpoint.classes or ()))
    args = {"num_classes": number, "in_chans": preprocessing.channels, **(config.get("model_args") or {})}
    network = create_model(architecture, image_size=preprocessing.size, logits=number, **args)
    if trained:
        load_weights(network, checkpoint, weights=weights)
    names = list(checkpoint.classes) if checkpoint.classes else default_classes(network)
    set_configuration(network, preprocessing, names)
    return network, preprocessing, names


def _preprocessing(config: Mapping[str, Any], cfg: Mapping[str, Any]) -> Preprocessing:
    saved = (config.get(CONTENTS) or {}).get("preprocessing")
    return Preprocessing.from_dict(saved) if saved else Preprocessing.of_model(cfg)


def _config_of_recipe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Derive `model_config` from the recipe of a checkpoint, for older ones that do not contain it."""
    recipe: Any = checkpoint.recipe
    try:
        model, data = recipe["model"], dict(recipe["data"])
        size = data.pop("image_size", None)
        names = {field.name for field in fields(Preprocessing)}
        changes = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in data.items()
            if key in names
        }
        if size is not None:
            changes["size"] = (size, size) if isinstance(size, int) else tuple(size)
        preprocessing = Preprocessing.of_model(timm.get_pretrained_cfg(model["name"]), **changes)
        return {
            "architecture": model["name"],
            "num_classes": len(checkpoint.classes or ()),
            "model_args": {key: value for key, value in model["args"].items() if key not in _OF_THE_CFG},
            CONTENTS: {"preprocessing": preprocessing.to_dict()},
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.path}: its recipe is damaged ({error!r})") from error


_OF_THE_CFG = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of `create_model` that only say where pretrained weights come from."""


def _of_bare_weights(
    checkpoint: Checkpoint, name: str | None, weights: Weights, trained: bool
) -> tuple[nn.Module, Preprocessing, list[str]]:
    """The classifier for a file that holds only weights, such as the authors'."""
    state_dict = checkpoint.state_dict(weights)
    number = _classes_in(state_dict)
    if name is None:
        name = _guess(checkpoint.path, state_dict, number)
    check_name(name)
    network = create_model(name, num_classes=number)
    if trained:
        load_weights(network, checkpoint, weights=weights)
    return network, Preprocessing.of_model(network), default_classes(network)


def _classes_in(state_dict: Mapping[str, Any]) -> int | None:
    """The number of classes: the rows of the last matrix, which is the classifier in all common models."""
    matrices = [value for value in state_dict.values() if isinstance(value, Tensor) and value.ndim in (2, 4)]
    last = [matrix for matrix in matrices if matrix.ndim == 2 or matrix.shape[2:] == (1, 1)]
    return len(last[-1]) if last else None


def _guess(path: str, state_dict: Mapping[str, Any], number: int | None) -> str:
    """The model of ours whose names and shapes are those of a file."""
    matches = []
    releases = set()  # a model and its aliases have the same address of pretrained weights
    for name in sorted(model_names(), key=len):
        model = create_on_meta(name, num_classes=number)
        if fits(model, state_dict):
            matches.append(name)
            releases.add(model.pretrained_cfg["url"])
    if len(releases) > 1:
        raise ModelError(f"{path}: fits {' and '.join(matches)}; say which, with model=…")
    if not matches:
        raise ModelError(
            f"{path}: does not say which model its weights are of, and they are none of the variants of "
            "VMamba; name it, with model=…"
        )
    return matches[0]


@cache
def _imagenet(subset: str) -> list[str]:
    return list(ImageNetInfo(subset).label_descriptions())


def default_classes(model: Any) -> list[str]:
    """ImageNet's class names if the model has as many classes, or else numbers."""
    subset = infer_imagenet_subset(model)
    return _imagenet(subset) if subset else [str(number) for number in range(model.num_classes)]


def set_configuration(model: Any, preprocessing: Preprocessing, classes: Sequence[str]) -> None:
    """Store preprocessing and classes in a timm model's `pretrained_cfg`, replacing its architecture's.

    `timm.data.resolve_model_data_config(model)` and exports read them there.
    """
    cfg = {
        key: value
        for key, value in (getattr(model, "pretrained_cfg", None) or {}).items()
        if key in ("architecture", "first_conv", "classifier", "fixed_input_size", "pool_size")
    }
    if cfg.get("pool_size") and tuple(model.pretrained_cfg["input_size"][1:]) != preprocessing.size:
        del cfg["pool_size"]  # it belongs to the other size
    model.pretrained_cfg = {
        **cfg,
        **preprocessing.to_pretrained_cfg(),
        "num_classes": len(classes),
        "label_names": list(classes),
    }
    model.default_cfg = model.pretrained_cfg  # timm's older name for it


def model_config(
    model: Any,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    *,
    task: str = CLASSIFICATION,
    model_args: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    category_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The content of a model's `config.json`: timm's hub form, with an additional key of ours; plain values.

    Args:
        model: A model of timm's registry, or with `task` the model of another task.
        preprocessing: The model's preprocessing.
        classes: The class names.
        task: Name of the task.
        model_args: The arguments that it was created with, besides `num_classes` and `in_chans`.
        recipe: The run's recipe, as plain values; a task other than classification creates its model from it.
        category_ids: The classes' numbers in annotation files, if they have such.

    Raises:
        ModelError: A model created from its name and `model_args` has other weights, so the file could not be
            loaded again.
    """
    given = getattr(model, "pretrained_cfg", None) or {}
    args = {key: value for key, value in (model_args or {}).items() if key not in _OF_THE_CFG}
    if task == CLASSIFICATION:
        _check_restorable(model, given.get("architecture", ""), args)
    cfg = {
        **{key: given[key] for key in ("first_conv", "classifier", "fixed_input_size") if key in given},
        **preprocessing.to_pretrained_cfg(),
        "num_classes": len(classes),
        "custom_load": False,
    }
    ours: dict[str, Any] = {"task": task, "preprocessing": preprocessing.to_dict()}
    if recipe is not None:
        ours["recipe"] = dict(recipe)
    if category_ids is not None:
        ours["category_ids"] = list(category_ids)
    config = {
        "architecture": given.get("architecture", type(model).__name__),
        "num_classes": len(classes),
        "num_features": getattr(model, "num_features", None),
        "label_names": list(classes),
        "model_args": args,
        "pretrained_cfg": cfg,
        CONTENTS: ours,
    }
    plain: dict[str, Any] = json.loads(json.dumps(config))
    return plain


def _check_restorable(model: nn.Module, architecture: str, args: Mapping[str, Any]) -> None:
    number, channels = getattr(model, "num_classes", None), getattr(model, "in_chans", None)
    defaults = {"num_classes": number, "in_chans": channels}
    restored = create_on_meta(architecture, **{**defaults, **args})
    shapes = {name: tensor.shape for name, tensor in restored.state_dict().items()}
    if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        raise ModelError(
            f"model_args: {architecture} with {dict(args)} has other weights than this model; give the "
            "arguments that it was created with"
        )


def save_pretrained(
    place: Place,
    model: nn.Module,
    config: Mapping[str, Any],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write `best.safetensors` and `config.json`, which `vmamba.load` and timm's `local-dir:` read.

    Args:
        place: A folder, or the path of the `.safetensors` file in it.
        model: The model whose weights are written.
        config: From `model_config`.
        state_dict: The weights to write instead of the model's, such as their average.

    Returns:
        The path of the weights.

    Raises:
        OSError: They cannot be written; what was there before is intact.
    """
    from safetensors.torch import save_file

    path = expand(place)
    if path.suffix != ".safetensors":
        path = path / BEST
    source = model.state_dict() if state_dict is None else state_dict
    # Copies: safetensors refuses weights that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in source.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", CONTENTS: state_digest(tensors)})
    write_atomically(path.parent / CONFIG, json.dumps(config, indent=2) + "\n")
    return path
