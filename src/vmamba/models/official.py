"""Loading of the weights that VMamba's authors released.

Their names and shapes are turned into ours; nothing is left over and nothing is missing, or the load raises
and the model stays as it was.
"""

import collections
import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from vmamba.errors import CheckpointError

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


def safe_globals() -> AbstractContextManager[None]:
    """Let `weights_only=True` read the yacs config that the authors' files hold, as a plain dict.

    yacs' class subclasses dict, so that its pickle fills it item by item, which the safe reader does for
    OrderedDict alone.
    """
    return torch.serialization.safe_globals([(collections.OrderedDict, "yacs.config.CfgNode")])


def _is_official(state_dict: Mapping[str, Any]) -> bool:
    return any(name.startswith(("layers.", "patch_embed.")) for name in state_dict)


def checkpoint_filter_fn(checkpoint: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Weights under the authors' names → under ours, for `load_state_dict`; ours pass as they are.

    Args:
        checkpoint: A state dict, or a checkpoint that holds one as "model" or "model_ema".
        model: The `VMamba` that they are for, which decides the shapes. One that has such names itself, as
            timm's Swin and ViT do, takes them as they are.
    """
    state_dict = next((checkpoint[key] for key in ("model", "model_ema") if key in checkpoint), checkpoint)
    own = model.state_dict()
    if not _is_official(state_dict) or _is_official(own):
        return dict(state_dict)
    shapes = {name: parameter.shape for name, parameter in own.items()}
    converted: dict[str, Any] = {}
    for name, weight in state_dict.items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        converted[name] = weight
        shape = shapes.get(name)
        if shape is None or not isinstance(weight, Tensor):
            continue
        # (K·D, N) → (K, D, N), (K·D,) → (K, D), and a linear layer saved as a 1×1 convolution.
        grouped = name.endswith((".op.A_log", ".op.D"))
        as_conv = weight.ndim == 4 and weight.shape[2:] == (1, 1)
        if (grouped or as_conv) and weight.numel() == shape.numel():
            converted[name] = weight.reshape(shape)
    return converted


def read_checkpoint(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a `.pth` file without running any code in it.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: It is damaged, or holds more than weights and plain settings.
    """
    with open(path, "rb"):  # what the system says of the file is told as it is
        pass
    try:
        with safe_globals():
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's message goes on with how to run the code after all.
        found = re.search(
            r"(Unsupported|Trying to load unsupported|Can only|Trying to call) [^\n]*", str(error)
        )
        reason = found[0] if found else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: refused, since reading it would run code or it is no PyTorch checkpoint ({reason})"
        ) from error
    except Exception as error:  # a damaged file can set off any
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged or no PyTorch checkpoint ({reason}); get it again") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: expected a dict of weights, got {type(checkpoint).__name__}")
    return checkpoint


def load_official(model: nn.Module, source: str | PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Load a checkpoint of VMamba's authors into a model.

    Args:
        model: A `VMamba` of the same settings, on any device and of any type.
        source: Their `.pth` file, which holds the weights as `model` or `model_ema`, or a state dict under
            their names; the first vanilla models' names are known too. Linear weights may be (out, in) or
            (out, in, 1, 1).

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file cannot be read safely, or weights are missing, left over or of another
            shape; the message lists all of them, and the model is as it was.
    """
    if isinstance(source, Mapping):
        where, checkpoint = "state dict", source
    else:
        where, checkpoint = str(source), read_checkpoint(source)
    weights = checkpoint_filter_fn(checkpoint, model)
    own = model.state_dict()
    problems = [f"missing: {name} {tuple(own[name].shape)}" for name in own if name not in weights]
    for name, weight in weights.items():
        if name not in own:
            problems.append(f"unexpected: {name}")
        elif not isinstance(weight, Tensor):
            problems.append(f"not a tensor: {name} ({type(weight).__name__})")
        elif weight.shape != own[name].shape:
            problems.append(f"shape: {name} expected {tuple(own[name].shape)}, got {tuple(weight.shape)}")
    if problems:
        hint = ""
        if any(name.startswith("outnorm") for name in weights):
            hint = (
                "\n'outnorm*' belong to a backbone of a detector or segmenter, which norms every stage's map"
            )
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"{where}: does not fit {type(model).__name__}; nothing was loaded. {len(problems)} problems:\n  "
            f"{listed}{hint}"
        )
    model.load_state_dict(weights)
    return model
