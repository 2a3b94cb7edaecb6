"""Small runs of detection and segmentation on the built-in shapes, for tests of several files."""

from typing import Any

STEPS = 6

SIZE = 64
"""Side of the images in training, in pixels."""


def values(task: str, **train: Any) -> dict[str, Any]:
    """A recipe's values: a micro model, 8 images to train on and as many to evaluate, in seconds."""
    args = {"stem_stride": 4, "depths": [1, 1, 1, 1], "dims": [8, 16, 16, 32], "drop_path_rate": 0.2}
    model: dict[str, Any] = {"name": "vmamba_pico", "args": args, "channels": 16}
    data = {"source": "shapes", "short_side": SIZE, "long_side": 96, "limit": 8}
    augment: dict[str, Any]
    if task == "detection":
        model |= {"hidden": 32, "proposals": 50, "detections": 20}
        augment = {"short_sides": [48, SIZE], "long_side": 96, "crop_probability": 0.5}
        augment |= {"crop_short_sides": [48], "crop_size": [40, 48]}
    else:
        model |= {"aux_channels": 8}
        augment = {"crop": SIZE, "base_size": [SIZE, 2 * SIZE]}
    return {
        "task": task,
        "model": model,
        "data": data,
        "augment": augment,
        "optim": {"lr": 2e-3, "decay": "paper"},
        "schedule": {"name": "polynomial", "steps": STEPS, "warmup_steps": 1, "min_lr": 0.0},
        "train": {
            "batch_size": 4,
            "micro_batch_size": 2,
            "eval_every_steps": 3,
            "checkpoint_every": 2,
            "workers": 0,
            "threads": 1,
            "ema_decay": 0.5,
            **train,
        },
    }
