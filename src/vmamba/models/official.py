"""The names of the VMamba authors' weights, turned into ours, and the strict load of their checkpoints."""

import re
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.models.checkpoints import safe_globals

__all__ = ["authors_names", "checkpoint_filter_fn", "convert_names", "load_official", "safe_globals"]

_NAMES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    # The first released vanilla models had these names.
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
    # From theirs to ours.
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.2\.", "stem.norm1."),
    (r"^patch_embed\.5\.", "stem.conv2."),
    (r"^patch_embed\.7\.", "stem.norm2."),
    (r"^layers\.(\d+)\.downsample\.1\.", r"layers.\1.downsample.conv."),
    (r"^layers\.(\d+)\.downsample\.3\.", r"layers.\1.downsample.norm."),
    (r"^layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^layers\.", "stages."),
    (r"(\.blocks\.\d+)\.norm\.", r"\1.norm1."),
    (r"\.op\.conv2d\.", ".op.conv."),
    (r"\.op\.A_logs$", ".op.A_log"),
    (r"\.op\.Ds$", ".op.D"),
    (r"\.op\.dt_projs_(weight|bias)$", r".op.dt_\1"),
    (r"^classifier\.norm\.", "norm."),
    (r"^classifier\.head\.", "head.fc."),
]

_NAMES_OF_THE_AUTHORS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"^stem\.conv1\.", "patch_embed.0."),
    (r"^stem\.norm1\.", "patch_embed.2."),
    (r"^stem\.conv2\.", "patch_embed.5."),
    (r"^stem\.norm2\.", "patch_embed.7."),
    (r"^stages\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) - 1}.downsample."),
    (r"^stages\.", "layers."),
    (r"\.downsample\.conv\.", ".downsample.1."),
    (r"(\.blocks\.\d+)\.norm1\.", r"\1.norm."),
    (r"\.op\.conv\.", ".op.conv2d."),
    (r"\.op\.A_log$", ".op.A_logs"),
    (r"\.op\.D$", ".op.Ds"),
    (r"\.op\.dt_(weight|bias)$", r".op.dt_projs_\1"),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.fc\.", "classifier.head."),
]


def convert_names(state_dict: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Weights under the authors' names and shapes → under ours; others pass as they are.

    Args:
        state_dict: Under the authors' names or ours.
        shapes: Of the model's weights. If the model itself has names such as `patch_embed.*`, as timm's Swin
            and ViT do, they are not converted.
    """
    if not _authors(state_dict) or _authors(shapes):
        return dict(state_dict)
    converted: dict[str, Any] = {}
    for name, weight in state_dict.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = weight
        shape = shapes.get(name)
        if shape is None or not isinstance(weight, Tensor):
            continue
        # (k·d, n) → (k, d, n), (k·d,) → (k, d), and a linear layer saved as a 1×1 convolution.
        grouped = name.endswith((".op.A_log", ".op.D"))
        as_conv = weight.ndim == 4 and weight.shape[2:] == (1, 1)
        if (grouped or as_conv) and weight.numel() == shape.numel():
            converted[name] = weight.reshape(shape)
    return converted


def authors_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a `VMamba` → under the authors' names and shapes; those of other models as they are."""
    if not any(name.endswith(".op.A_log") for name in state_dict):
        return dict(state_dict)
    converted: dict[str, Any] = {}
    for name, weight in state_dict.items():
        grouped = name.endswith((".op.A_log", ".op.D"))  # (k, d, n) → (k·d, n), (k, d) → (k·d,)
        for pattern, replacement in _NAMES_OF_THE_AUTHORS:
            name = re.sub(pattern, replacement, name)
        # Beside a convolution the authors' norm has an index; in patch merging it has a name.
        if name.endswith(("downsample.norm.weight", "downsample.norm.bias")):
            beside = f"stages.{int(name.split('.')[1]) + 1}.downsample.conv.weight"
            name = name.replace(".norm.", ".3.") if beside in state_dict else name
        converted[name] = weight.flatten(0, 1) if grouped else weight
    return converted


def _authors(names: Mapping[str, Any]) -> bool:
    return any(name.startswith(("layers.", "patch_embed.")) for name in names)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """`convert_names` in the form in which timm calls it, for `pretrained=True`.

    Args:
        checkpoint: A state dict, or a checkpoint that holds one as "model" or "model_ema".
        model: The model that they are for, which decides the shapes.
    """
    state_dict = next((checkpoint[key] for key in ("model", "model_ema") if key in checkpoint), checkpoint)
    return convert_names(state_dict, {name: weight.shape for name, weight in model.state_dict().items()})


def load_official(model: nn.Module, source: str | PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Load a checkpoint of VMamba's authors into a model of the same settings: everything must match.

    For another classifier, other channels or depths use `vmamba.load_weights`, which has options for them.

    Args:
        model: A `VMamba` of the same settings, on any device and of any type.
        source: Their `.pth` file, which holds the weights as `model` or `model_ema`, or a state dict under
            their names; the first vanilla models' names are known too. Linear weights may be (out, in) or
            (out, in, 1, 1).

    Returns:
        The model.

    Raises:
        MissingCheckpointError: There is no such file (a `FileNotFoundError`).
        CheckpointError: The file cannot be read safely, or weights are missing, left over or of another
            shape; the message lists all of them, and the model is as it was.
    """
    from vmamba.models.weights import load_weights  # which uses this file's names

    load_weights(model, source)
    return model
