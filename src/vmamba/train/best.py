"""The best weights of a run, in the form that timm and `vmamba.load` read."""

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

from vmamba.errors import OutputError
from vmamba.files import replacing, write_atomically
from vmamba.models.checkpoints import CONFIG, CONTENTS, open_checkpoint, state_digest

log = logging.getLogger(__name__)


def write_best(checkpoint: Path, model: nn.Module, folder: Path) -> None:
    """Write best.safetensors and config.json.

    Args:
        checkpoint: Of the run; its averaged weights are taken where it has them.
        model: That the weights are for, with timm's `pretrained_cfg`.
        folder: Of the run.

    Raises:
        OutputError: A file cannot be written.
    """
    from safetensors.torch import save_file

    opened = open_checkpoint(checkpoint)
    assert opened.recipe is not None
    weights = {name: weight.clone().contiguous() for name, weight in opened.state_dict().items()}
    config = _config(opened.recipe["model"], model)
    try:
        with replacing(folder / "best.safetensors") as temporary:
            save_file(weights, temporary, {"format": "pt", CONTENTS: state_digest(weights)})
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{folder}/best.safetensors: could not be written ({error})") from error


def _config(section: Any, model: Any) -> dict[str, Any]:
    """timm's hub form."""
    known = dict(getattr(model, "pretrained_cfg", None) or {})
    dropped = ("url", "file", "state_dict", "hf_hub_id", "source", "custom_load")
    cfg = {key: value for key, value in known.items() if value is not None and key not in dropped}
    config = {"architecture": section["name"].partition(".")[0], "pretrained_cfg": cfg}
    for name in ("num_classes", "num_features", "global_pool"):
        if isinstance(value := getattr(model, name, None), int | str):
            config[name] = value
    if labels := cfg.pop("label_names", None):
        config["label_names"] = labels
    arguments = dict(section["args"])
    if "input_size" in cfg and cfg["input_size"][0] != 3:
        arguments["in_chans"] = cfg["input_size"][0]
    return {**config, "model_args": arguments}
