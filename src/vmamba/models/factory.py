"""The one factory of models, by name; it explains why a model or an argument cannot work."""

import difflib
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import nn
from torch.overrides import TorchFunctionMode

from vmamba.errors import CheckpointError, ModelError
from vmamba.models import model_names  # and this registers the models

_REFUSED = {
    "checkpoint_path": "load a file with vmamba.load_weights, or a recipe's model.weights",
    "device": "move the model with model.to(device)",
    "dtype": "convert the model with model.to(dtype)",
}
"""Arguments of `timm.create_model` that are not of the model, and what to use instead."""

_TRIAL_BATCH = 2


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    image_size: tuple[int, int] | None = None,
    logits: int | None = None,
    **args: Any,
) -> Any:
    """A model (`nn.Module`) of timm's registry, ours among them.

    If `args`, `image_size` or `logits` are given, one forward pass runs on the meta device before the model
    is made, so that a combination that cannot work raises at once.

    Args:
        name: With or without a tag of pretrained weights: "vmamba_tiny", "vmamba_tiny.authors_in1k".
        pretrained: Load its weights, which are downloaded unless they come with the package.
        image_size: (height, width) of the images; models that are made for one size are made for this one.
        logits: The number of classes that the model must give logits for; None if it need not be a
            classifier.
        args: Arguments of the model, such as `num_classes`, `in_chans` or `drop_path_rate`.

    Raises:
        ModelError: There is no such model, tag or argument, an argument is out of range, or the model does
            not work with them.
        CheckpointError: No pretrained weights were released, they cannot be downloaded, or do not fit.
    """
    check_name(name)
    _check_args(name, args)
    args = _with_size(name, args, image_size)
    if args or logits is not None:
        _try(name, args, image_size, logits)
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except (RuntimeError, OSError) as error:
        if not pretrained:
            raise
        config = timm.get_pretrained_cfg(name)
        if "pretrained_cfg_overlay" not in args and not (config and config.has_weights):
            raise CheckpointError(
                f"no pretrained weights of {name} were released; train it without them, or give a checkpoint "
                "that you have: vmamba.load(PATH), --checkpoint PATH, or model.weights=PATH in a recipe"
            ) from None
        raise CheckpointError(
            f"the pretrained weights of {name} cannot be had, or do not fit: {str(error) or repr(error)}"
        ) from error


def create_on_meta(name: str, image_size: tuple[int, int] | None = None, **args: Any) -> Any:
    """A model (`nn.Module`) without memory for its weights.

    Args:
        name: As `create_model`.
        image_size: As `create_model`.
        args: As `create_model`.

    Raises:
        ModelError: There is no such model, tag or argument, or the model refuses an argument.
    """
    check_name(name)
    _check_args(name, args)
    args = _with_size(name, args, image_size)
    try:
        with torch.device("meta"), _WithoutValues(), warnings.catch_warnings():
            # A layer without elements: the forward pass of `create_model` says what is wrong.
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            model = timm.create_model(name, **args)
    except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, IndexError) as error:
        listed = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise ModelError(f"{name} does not take ({listed}): {error}") from error
    _check_types(model, name, args)
    return model


class _WithoutValues(TorchFunctionMode):
    """Leaves out what only changes values: on the meta device there are none.

    PyTorch would go through each such function in Python, which is most of the time that a model takes there.
    """

    _VALUES_ONLY = re.compile(
        "(add|clamp|clamp_max|clamp_min|copy|div|erfinv|exp|fill|log|mul|neg|normal|pow|sub|trunc_normal|uniform|"
        "zero|(kaiming|xavier)_(normal|uniform))_"
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._VALUES_ONLY.fullmatch(getattr(func, "__name__", "")):
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def check_name(name: str) -> None:
    """Refuse a name that is not in timm's registry, or a tag that the model does not have.

    Raises:
        ModelError: With the names nearest to it.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        ours = model_names()
        everything = [*ours, *timm.list_models()]
        close = list(dict.fromkeys(difflib.get_close_matches(architecture, everything, n=4)))
        close = close or timm.list_models(f"*{architecture}*")[:4]
        hint = f"did you mean {' or '.join(close)}?" if close else f"ours are {', '.join(ours)}"
        raise ModelError(f"unknown model {name!r}; {hint} (`vmamba list` shows ours, timm.list_models() all)")
    tags = [full.partition(".")[2] for full in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        known = ", ".join(repr(known) for known in tags if known) or "no tags"
        raise ModelError(f"unknown model {name!r}: {architecture} has {known}, not {tag!r}")


def _check_args(name: str, args: Mapping[str, Any]) -> None:
    """Refuse arguments whose errors a forward pass would not show, such as a rate out of range."""
    for key, value in args.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in _REFUSED:
            raise ModelError(f"{key}: not an argument of {name}; {_REFUSED[key]}")
        if key.endswith("_rate") and value is not None and not (number and 0 <= value < 1):
            raise ModelError(f"{key}: expected a number from 0 to below 1, got {value!r}")
        if key.endswith("_ratio") and number and value < 0:
            raise ModelError(f"{key}: expected a number of at least 0, got {value!r}")
        if key in ("num_classes", "in_chans"):
            least = 0 if key == "num_classes" else 1
            if value is not None and not (isinstance(value, int) and number and value >= least):
                raise ModelError(f"{key}: expected a whole number of at least {least}, got {value!r}")


def _check_types(model: nn.Module, name: str, args: Mapping[str, Any]) -> None:
    """Refuse text for a number, and anything but a bool for a bool: `gate="maybe"` would count as true."""
    for key, parameter in inspect.signature(type(model)).parameters.items():
        kind = getattr(parameter.annotation, "__name__", parameter.annotation)
        value = args.get(key)
        if value is None:
            continue
        not_bool = kind == "bool" and not isinstance(value, bool)
        not_number = kind in ("int", "float") and isinstance(value, str | bool)
        if not_bool or not_number:
            raise ModelError(f"{key}: {name} expects {kind}, got {value!r}")


def _with_size(name: str, args: Mapping[str, Any], image_size: tuple[int, int] | None) -> dict[str, Any]:
    """The arguments, with `img_size` for a model that is made for one size of images."""
    args = {key: value for key, value in args.items() if value is not None}
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    return {**args, "img_size": image_size} if fixed and image_size and "img_size" not in args else args


def _try(name: str, args: Mapping[str, Any], image_size: tuple[int, int] | None, logits: int | None) -> None:
    """One forward pass on the meta device, in evaluation mode."""
    model = create_on_meta(name, image_size, **args).eval()
    channels, *size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    height, width = image_size or _pair(args.get("img_size")) or size
    images = torch.empty(_TRIAL_BATCH, args.get("in_chans", channels), height, width, device="meta")
    listed = "".join(f", {key}={value!r}" for key, value in args.items())
    output = output_on_meta(model, images, f"{name} does not work with {height}×{width} images{listed}")
    if output is None:
        return
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if logits is not None and shape != (_TRIAL_BATCH, logits):
        listed = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise ModelError(
            f"{name} with {listed} gives {shape} for {_TRIAL_BATCH} images, not logits of {logits} classes "
            f"({_TRIAL_BATCH}, {logits})"
        )


def output_on_meta(model: nn.Module, images: torch.Tensor, refusal: str) -> Any:
    """What a model gives for images; None if one of its operators cannot run on the meta device.

    Args:
        model: On the meta device.
        images: There too.
        refusal: How the message begins if the model does not take them.

    Raises:
        ModelError: It does not.
    """
    try:
        with torch.no_grad():
            return model(images)
    except NotImplementedError:
        return None
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        raise ModelError(f"{refusal}: {error}") from error


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else tuple(size)
