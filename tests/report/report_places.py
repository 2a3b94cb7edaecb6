"""Folders of runs and evaluations, written without training."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from dense_runs import values as dense_values
from images import tiny_values
from vmamba.train.recipe import check
from vmamba.train.tasks import task_type

METRICS = {
    "classification": "epoch,step,lr,images/s,train/accuracy,train/loss,val/loss,val/top1,val/top5\n"
    "1,4,0.1,50,0.3,2.5,2.25,0.1,1\n2,8,0.1,60,0.5,1.5,nan,0.75,1\n",
    "detection": "epoch,step,lr,images/s,train/loss,val/box_AP,val/ema_box_AP\n1,4,0.1,9,2.5,0.25,0.2\n",
    "segmentation": "epoch,step,lr,images/s,train/loss,val/ema_mIoU,val/mIoU\n1,4,0.1,9,2.5,0.25,0.2\n",
}


def make_run(
    folder: Path, task: str = "classification", classes: int = 3, metrics: str | None = None, **model: Any
) -> Path:
    """A run's folder after its last evaluation.

    Args:
        folder: To make.
        task: Of the run.
        classes: How many its data have.
        metrics: Of metrics.csv.
        model: The recipe's section.
    """
    values = tiny_values(folder) if task == "classification" else dense_values(task)
    values["model"] |= model
    recipe = check(task_type(task).recipe_type, values, "test")
    recipe = task_type(task).resolve(recipe)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "env.json").write_text(json.dumps({"torch": "2.9.9", "gpus": [], "command": ["vmamba", "a b"]}))
    events: list[dict[str, Any]] = [
        {"date": "2026-01-01T10:00:00+00:00", "step": 0, "command": ["vmamba", "train", "a b.yaml"]},
        {"date": "2026-01-03T10:00:00+00:00", "step": 4, "command": [], "changes": {"optim.lr": [1, 2]}},
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    names = ["<b>bold</b>", *(f"class {number}" for number in range(1, classes))]
    config = {"architecture": "any", "label_names": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.csv").write_text(METRICS[task] if metrics is None else metrics)
    return folder


def make_evaluation(
    folder: Path,
    source: str,
    scores: dict[str, float],
    date: str = "2026-01-04T00:00:00+00:00",
    **change: Any,
) -> Path:
    """What `vmamba eval --out` writes."""
    folder.mkdir(parents=True)
    values = {"source": source, "weights": "raw", "flip": False, "scales": [1.0], "samples": 9, "skipped": []}
    values |= {"scores": scores, "environment": {"date": date, "command": ["vmamba", "eval", source]}}
    (folder / "results.json").write_text(json.dumps({**values, **change}))
    rows = "".join(f"<i>{number}</i>,{number}\n" for number in range(150))
    (folder / "per_class.csv").write_text(f"name,samples\n{rows}")
    Image.effect_noise((2400, 300), 90).save(folder / "confusion.png")
    return folder
