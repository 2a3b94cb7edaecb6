"""Detection and segmentation, from a recipe to a report, by the loop that all tasks share."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import vmamba
from dense_runs import SIZE, STEPS, values
from images import assert_same
from vmamba.errors import CheckpointError, DataError, ModelError, RecipeError
from vmamba.heads import Features, mmdet_names
from vmamba.models.checkpoints import read_checkpoint
from vmamba.train import run
from vmamba.train.curves import read_metrics
from vmamba.train.evaluation import evaluate, write_evaluation
from vmamba.train.guard import NonFiniteError
from vmamba.train.loaders import loader
from vmamba.train.recipe import check
from vmamba.train.runs import find_runs
from vmamba.train.session import load_recipe, open_session, training_session
from vmamba.train.tasks import task_type
from vmamba.train.tasks.segmentation import SegmentationTask

TASKS = ["detection", "segmentation"]
MONITOR = {"detection": "box_AP", "segmentation": "mIoU"}
REPORT = {
    "detection": {
        "results.json",
        "ap.csv",
        "precision_recall.csv",
        "precision_recall.png",
        "confusion.csv",
        "confusion.png",
        "worst.png",
    },
    "segmentation": {"results.json", "iou.csv", "confusion.csv", "confusion.png", "worst.png"},
}


def write_recipe(folder: Path, task: str, **train: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(task, **train)))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each task."""
    folders = {}
    for task in TASKS:
        folders[task] = tmp_path_factory.mktemp(task)
        run.train(load_recipe(write_recipe(folders[task], task)), folders[task])
    return folders


def state(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def rows(folder: Path) -> list[dict[str, str]]:
    """But for the speed."""
    table = read_metrics(folder / "metrics.csv")
    return [{name: value for name, value in row.items() if name != "images/s"} for row in table]


@pytest.mark.parametrize("task", TASKS)
def test_trained(task: str, runs: dict[str, Path]) -> None:
    table = rows(runs[task])
    assert [row["step"] for row in table] == ["3", "6"]
    assert float(table[1]["train/loss"]) < float(table[0]["train/loss"])
    (described,) = find_runs(runs[task])
    assert (described.state, described.unit, described.length) == ("finished", "steps", STEPS)
    assert described.best == max(float(row[f"val/ema_{MONITOR[task]}"]) for row in table)
    for name in ("best.safetensors", "config.json", "curves.png"):
        assert (runs[task] / name).stat().st_size > 0


@pytest.mark.parametrize("task", TASKS)
def test_evaluated_and_reported(task: str, runs: dict[str, Path], tmp_path: Path) -> None:
    evaluation = evaluate(runs[task], keep_predictions=True)
    assert (evaluation.weights, evaluation.samples) == ("ema", 8)
    best = max(float(row[f"val/ema_{MONITOR[task]}"]) for row in rows(runs[task]))
    assert evaluation.scores[MONITOR[task]] == pytest.approx(best, abs=1e-6)
    write_evaluation(evaluation, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == REPORT[task]
    table = evaluation.class_table
    assert [row["name"] for row in table] == evaluation.classes
    json.dumps(table, allow_nan=False)


@pytest.mark.parametrize("task", TASKS)
def test_predicted_from_the_run_and_from_its_weights(task: str, runs: dict[str, Path]) -> None:
    image = torch.randint(256, (3, SIZE, 80), dtype=torch.uint8)
    expected = open_session(runs[task]).predictor()(image)
    for source in (runs[task], runs[task] / "best.safetensors"):
        assert repr(vmamba.load(source)(image)) == repr(expected)
        weights, drawn = (
            vmamba.load(source, trained=trained).model.state_dict() for trained in (True, False)
        )
        assert weights.keys() == drawn.keys()
        assert not all(torch.equal(weights[name], drawn[name]) for name in weights)


def test_other_names_of_the_classes(runs: dict[str, Path]) -> None:
    names = [f"shape {number}" for number in range(6)]
    assert vmamba.load(runs["detection"], classes=names).classes == names
    with pytest.raises(ModelError, match="classes: 1 name for a model of 6 classes"):
        vmamba.load(runs["detection"], classes=["shape"])


@pytest.mark.parametrize("task", TASKS)
def test_another_backbone_than_the_runs(task: str, runs: dict[str, Path]) -> None:
    for source in (runs[task], runs[task] / "best.safetensors"):
        assert vmamba.load(source, model="vmamba_pico").task == task
        with pytest.raises(ModelError, match=r"model: the backbone of .* is vmamba_pico, not vmamba_tiny"):
            vmamba.load(source, model="vmamba_tiny")


def write_coco(folder: Path, split: str, categories: dict[int, str]) -> None:
    """Four images, on each a square of each category."""
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, 5):
        Image.new("RGB", (SIZE, SIZE), (40 * number, 90, 120)).save(folder / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": SIZE, "width": SIZE})
        for place, category in enumerate(categories):
            left, top, side = 30 * place + 2, 5, 25
            corners = [left, top, left + side, top, left + side, top + side, left, top + side]
            square = {"bbox": [left, top, side, side], "area": side**2, "segmentation": [corners]}
            owner = {"id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0}
            annotations.append({**owner, **square})
    named = [{"id": number, "name": name} for number, name in categories.items()]
    values = {"images": images, "annotations": annotations, "categories": named}
    (folder / f"{split}.json").write_text(json.dumps(values))


def test_a_run_keeps_the_ids_of_its_annotation_file(tmp_path: Path) -> None:
    """Without its data too; a file without ids is as before."""
    data, out = tmp_path / "data", tmp_path / "run"
    for split in ("train", "val"):
        write_coco(data, split, {90: "cat", 3: "dog"})
    recipe = values("detection", batch_size=2, eval_every_steps=1)
    recipe["schedule"] |= {"steps": 1, "warmup_steps": 0}
    recipe["data"] = {"source": "coco", "root": str(data), "short_side": SIZE, "long_side": 96}
    for split in ("train", "val"):
        recipe["data"] |= {f"{split}_split": split, f"{split}_annotations": f"{split}.json"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run.train(load_recipe(tmp_path / "recipe.yaml"), out)
    shutil.rmtree(data / "train")
    (data / "train.json").unlink()
    for source in (out, out / "best.safetensors"):
        predictor: Any = open_session(source).predictor()
        assert (predictor.classes, predictor.category_ids) == (["dog", "cat"], [3, 90])
        assert evaluate(source).classes == ["dog", "cat"]
    shutil.rmtree(data)
    for source in (out, out / "best.safetensors"):
        assert vmamba.load(source).category_ids == [3, 90]
    config = json.loads((out / "config.json").read_text())
    del config["vmamba"]["category_ids"]
    (out / "config.json").write_text(json.dumps(config))
    assert vmamba.load(out / "best.safetensors").category_ids == [1, 2]


KILLED = """
import os, signal
from vmamba.train import run
from vmamba.train.session import load_recipe
from vmamba.train.tasks import task_type
from vmamba.train.tasks.segmentation import SegmentationTask
recipe = load_recipe({recipe!r})
task = task_type(recipe.task)
step, calls = task.training_step, [0]
def counted(self, model, batch):
    calls[0] += 1
    if calls[0] == 10:  # in step 5, of two passes each; the last checkpoint is that of step 4
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, model, batch)
task.training_step = counted
run.train(recipe, {out!r})
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_ends_with_the_same_bits(task: str, runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    code = KILLED.format(recipe=str(write_recipe(tmp_path, task)), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run.resume(out)
    assert_same(state(out), state(runs[task]))
    assert rows(out) == rows(runs[task])


def test_workers_change_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    run.train(load_recipe(write_recipe(tmp_path, "detection", workers=2)), tmp_path)
    assert_same(state(tmp_path), state(runs["detection"]))


def test_averaged_over_scales_and_mirror_images(runs: dict[str, Path]) -> None:
    evaluation = evaluate(runs["segmentation"], flip=True, scales=(0.75, 1.0))
    assert 0 <= evaluation.scores["mIoU"] <= 1
    with pytest.raises(RecipeError, match="test-time augmentation: not for detection"):
        evaluate(runs["detection"], flip=True)


def test_windows_that_cover_the_image_change_nothing(runs: dict[str, Path]) -> None:
    whole = evaluate(runs["segmentation"])
    covered = evaluate(runs["segmentation"], ["data.window=96"])
    assert covered.results["confusion"].equal(whole.results["confusion"])
    smaller = evaluate(runs["segmentation"], ["data.window=48", "data.stride=16"])
    assert not smaller.results["confusion"].equal(whole.results["confusion"])
    with pytest.raises(RecipeError, match="stride 16: expected a window"):
        evaluate(runs["segmentation"], ["data.stride=16"])


def begin(tmp_path: Path, task: str, *overrides: str) -> Any:
    """The model that a recipe would train."""
    return training_session(load_recipe(write_recipe(tmp_path, task), overrides)).model


def test_begun_from_a_detectors_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    """Whole, the backbone alone, and under mmdet's names."""
    trained = open_session(runs["detection"]).model.state_dict()
    source = runs["detection"] / "best.safetensors"
    whole = begin(tmp_path, "detection", f"model.weights={source}").state_dict()
    assert_same(whole, trained)
    backbone = begin(tmp_path, "detection", f"model.weights={source}", "model.weights_of=backbone")
    for name, value in backbone.state_dict().items():
        head = not name.startswith("backbone.body.") and value.ndim > 1
        assert not (head and value.any() and value.equal(trained[name])), name
        assert head or value.ndim < 2 or value.equal(trained[name]), name
    theirs = tmp_path / "theirs.pth"
    torch.save({"state_dict": mmdet_names(trained)}, theirs)
    assert_same(begin(tmp_path, "detection", f"model.weights={theirs}").state_dict(), trained)
    # A segmenter takes the backbone of a detector.
    segmenter = begin(tmp_path, "segmentation", f"model.weights={source}").backbone.state_dict()
    assert_same(segmenter, {name: trained[f"backbone.body.{name}"] for name in segmenter})


def test_weights_that_do_not_fit(runs: dict[str, Path], tmp_path: Path) -> None:
    source = runs["detection"] / "best.safetensors"
    with pytest.raises(CheckpointError, match="does not fit"):
        begin(tmp_path, "detection", f"model.weights={source}", "model.args.dims=[16, 16, 16, 32]")
    backbone = tmp_path / "backbone.pth"
    torch.save(open_session(runs["detection"]).model.backbone.body.state_dict(), backbone)
    with pytest.raises(CheckpointError, match="holds a backbone without a head"):
        evaluate(write_recipe(tmp_path, "segmentation"), [f"model.weights={backbone}"])


def test_beginning_without_weights_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    begin(tmp_path, "segmentation")
    assert "model.weights: none given, so the backbone starts anew" in caplog.text


def test_batchnorm_needs_two_images_at_a_time(tmp_path: Path) -> None:
    for override in ("train.micro_batch_size=1", "train.batch_size=1", "train.sync_batchnorm=true"):
        overrides = ["train.micro_batch_size=1", override]
        with pytest.raises(RecipeError, match="BatchNorm would see 1 sample at a time and needs at least 2"):
            run.train(load_recipe(write_recipe(tmp_path, "segmentation"), overrides), tmp_path / "run")


@pytest.mark.parametrize("task", TASKS)
def test_outputs_that_are_not_finite_are_no_scores(
    task: str, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A detector of NaN finds nothing, and a segmenter the first class everywhere, as sound ones may."""
    forward = Features.forward
    monkeypatch.setattr(Features, "forward", lambda self, x: [each * torch.nan for each in forward(self, x)])
    with pytest.raises(NonFiniteError, match="the model's outputs are not finite"):
        evaluate(runs[task])


def test_a_step_that_is_left_out_leaves_no_trace_in_batchnorm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one batch of infinities would stay in the running statistics, and so in every evaluation."""
    step, calls = SegmentationTask.training_step, [0]

    def infinite(self: Any, model: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:  # the first pass of step 2
            batch = {**batch, "images": batch["images"] * torch.inf}
        return step(self, model, batch)

    monkeypatch.setattr(SegmentationTask, "training_step", infinite)
    recipe = load_recipe(write_recipe(tmp_path, "segmentation", on_nonfinite="skip"), ["schedule.steps=3"])
    run.train(recipe, tmp_path / "run")
    assert all(value.isfinite().all() for value in state(tmp_path / "run").values())


def test_a_frozen_backbone_never_changes(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its norms on the maps and the head do."""
    source = runs["detection"] / "best.safetensors"
    overrides = [f"model.weights={source}", "model.freeze=backbone", "schedule.steps=2"]
    run.train(load_recipe(write_recipe(tmp_path, "detection"), overrides), tmp_path / "run")
    before = open_session(runs["detection"]).model.state_dict()
    after = {name.removeprefix("model."): value for name, value in state(tmp_path / "run").items()}
    for name, value in before.items():
        if name.startswith("backbone.body.model."):
            assert value.equal(after[name]), name
    assert not before["backbone.body.outnorm0.weight"].equal(after["backbone.body.outnorm0.weight"])
    assert not before["rpn.head.cls_logits.weight"].equal(after["rpn.head.cls_logits.weight"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=vit_tiny_patch16_224", "expected feature maps at the strides"),
        ("model.args.num_classes=3", "model.args.num_classes: not here"),
        ("model.args.eggs=3", "eggs"),
        ("data.short_side=200", "short_side 200 is above long_side 96"),
        ("data.image_size=64", "no such key"),
    ],
)
def test_recipes_that_cannot_be_run(override: str, message: str, tmp_path: Path) -> None:
    overrides = [override]
    if override.startswith("model.name"):
        overrides.append("model.args={}")
    with pytest.raises(RecipeError, match=message):
        begin(tmp_path, "segmentation", *overrides)


@pytest.mark.parametrize("task", TASKS)
def test_images_are_evaluated_one_by_one_and_each_once(task: str) -> None:
    recipe: Any = check(task_type(task).recipe_type, values(task), "the test")
    opened = task_type(task)(recipe)
    keys = []
    for rank in range(2):
        trainer: Any = SimpleNamespace(world_size=2, global_rank=rank)
        assert loader(opened, opened.recipe, "train", trainer).batch_size == 2
        data = loader(opened, opened.recipe, "val", trainer)
        assert data.batch_size == 1
        keys += [key.index for key in data.sampler]
    assert sorted(keys) == list(range(8))


def coco_values(folder: Path, *annotations: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values for a file of two images, 1 and 2."""
    (folder / "images").mkdir()
    square = {"bbox": [2, 2, 9, 9], "segmentation": [[2, 2, 11, 2, 11, 11, 2, 11]], "area": 81}
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 50, "height": 40} for n in (1, 2)],
        "annotations": [{"id": n, "category_id": 1, **square, **a} for n, a in enumerate(annotations)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    data = {"source": "coco", "root": str(folder), "train_split": "images", "val_split": "images"}
    files = {"train_annotations": "instances.json", "val_annotations": "instances.json"}
    return {**values("detection"), "data": {**data, **files}}


def coco_task(recipe: dict[str, Any]) -> Any:
    detection: Any = task_type("detection")
    return detection(check(detection.recipe_type, recipe, "the test"))


def test_a_val_split_without_objects_is_refused_before_the_run(tmp_path: Path) -> None:
    recipe = coco_values(tmp_path, {"image_id": 1, "iscrowd": 1}, {"image_id": 2, "iscrowd": 0})
    assert len(coco_task(recipe).dataset("val")) == 2
    recipe["data"]["limit"] = 1
    with pytest.raises(DataError, match=r"not one of the 1 evaluated images has an object .* no crowd"):
        coco_task(recipe).dataset("val")


def test_classes_without_training_objects_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = coco_task(coco_values(tmp_path, {"image_id": 1, "iscrowd": 0}))
    task.dataset("val")
    assert "no objects of" not in caplog.text
    task.dataset("train")
    assert "no objects of 1 of 2 classes: 'dog'" in caplog.text
