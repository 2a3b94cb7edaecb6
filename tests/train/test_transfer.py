"""From a checkpoint onto other classes and another resolution."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import muon
from torch import Tensor, nn

from images import make_folder, tiny_values
from vmamba.errors import CheckpointError, RecipeError
from vmamba.models import load_weights
from vmamba.models.checkpoints import open_checkpoint, read_checkpoint
from vmamba.train import run
from vmamba.train.module import TaskModule
from vmamba.train.recipe import check, override_values
from vmamba.train.stop import Interrupted
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask

SMALL = (
    "model={name: vmamba_pico, args: {depths: [1, 1], dims: [8, 16], stem_stride: 4, drop_path_rate: 0.5}}"
)


def recipe(folder: Path, *overrides: str) -> ClassificationRecipe:
    return check(ClassificationRecipe, override_values(tiny_values(folder), [SMALL, *overrides]), "test")


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_folder(tmp_path_factory.mktemp("two"))
    for split in ("train", "val"):
        (root / split / "green").rename(root.parent / f"{root.name}_{split}")
    return root


@pytest.fixture(scope="module")
def source(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source")
    run.train(recipe(folder, "schedule.epochs=2", "train.ema_decay=0.5"), out)
    return out / "checkpoints" / "last.ckpt"


def test_other_classes_and_another_resolution(
    source: Path, two_classes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = recipe(
        two_classes,
        f"model.weights={source}",
        "data.image_size=48",
        "schedule.epochs=2",
        "optim.layer_decay=0.5",
    )
    model = ClassificationTask(changed).build_model(changed)
    assert f"{source}: the classifier starts anew: head.fc.weight, head.fc.bias" in caplog.text
    expected = open_checkpoint(source).state_dict("ema")
    for name, value in model.state_dict().items():
        if name.startswith("head.fc."):
            assert value.shape[0] == 2
        else:
            assert torch.equal(value, expected[name]), name
    scores = run.train(changed, tmp_path).scores
    assert scores["val/top1"] >= 0


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_which_weights_of_a_run(kind: str, source: Path, folder: Path) -> None:
    changed = recipe(folder, f"model.weights={source}", f"model.weights_kind={kind}")
    model = ClassificationTask(changed).build_model(changed)
    expected = open_checkpoint(source).state_dict(kind)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_nothing_else_may_differ(source: Path, two_classes: Path) -> None:
    wider = SMALL.replace("[8, 16]", "[8, 24]")
    changed = check(
        ClassificationRecipe,
        override_values(tiny_values(two_classes), [wider, f"model.weights={source}"]),
        "test",
    )
    with pytest.raises(CheckpointError, match="does not fit VMamba; nothing was loaded"):
        ClassificationTask(changed).build_model(changed)


@pytest.mark.parametrize("classes", [3, 2])
def test_a_peer_with_the_authors_names(classes: int, tmp_path: Path) -> None:
    """A ViT has a patch_embed too, which is none of the authors' to be renamed."""
    source, model = (timm.create_model("test_vit", num_classes=number) for number in (3, classes))
    path = tmp_path / "vit.safetensors"
    save_file(source.state_dict(), path)
    load_weights(model, path, classifier="new")
    expected = source.state_dict()
    same = {name for name, value in model.state_dict().items() if value.equal(expected[name])}
    assert expected.keys() - same == (set() if classes == 3 else {"head.weight", "head.bias"})


def test_a_model_without_a_classifier_takes_only_what_fits(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 4).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"weight expected \(3, 2\), got \(4, 2\)"):
        load_weights(nn.Linear(2, 3), str(tmp_path / "weights.pth"))


def test_a_linear_probe_trains_the_classifier_alone(source: Path, two_classes: Path, tmp_path: Path) -> None:
    changed = recipe(two_classes, f"model.weights={source}", "model.freeze=backbone", "schedule.epochs=2")
    run.train(changed, tmp_path)
    before = open_checkpoint(source).state_dict("ema")
    last = tmp_path / "checkpoints" / "last.ckpt"
    actual = read_checkpoint(last)
    after = open_checkpoint(last).state_dict()
    changed_names = {
        name for name in after if not name.startswith("head.fc") and not after[name].equal(before[name])
    }
    assert not changed_names
    groups = actual["optimizer_states"][0]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == 2
    assert any(state["exp_avg"].abs().sum() > 0 for state in actual["optimizer_states"][0]["state"].values())


def test_a_linear_probe_has_no_drop_path(source: Path, folder: Path) -> None:
    """The features of an image are the same from step to step."""
    changed = recipe(folder, f"model.weights={source}", "model.freeze=backbone")
    task = ClassificationTask(changed)
    module = TaskModule(task, changed, task.build_model(changed), 4)
    for _ in range(2):
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(module.model(images), module.model(images))
        module.train()


def test_a_linear_probe_needs_weights(folder: Path) -> None:
    with pytest.raises(RecipeError, match="freeze: without weights a frozen backbone stays random"):
        recipe(folder, "model.freeze=backbone")


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_linear_probe_ends_with_the_same_weights(
    step: int, source: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = recipe(folder, f"model.weights={source}", "model.freeze=backbone", "schedule.epochs=2")
    run.train(changed, tmp_path / "whole")
    loss, calls = ClassificationTask.training_step, [0]

    def interrupted(self: ClassificationTask, model: nn.Module, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "training_step", interrupted)
        with pytest.raises(Interrupted):
            run.train(changed, tmp_path / "stopped")
    run.resume(tmp_path / "stopped")
    whole, resumed = (
        open_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt").state_dict()
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def pretrained(folder: Path, source: Path, tmp_path: Path, *overrides: str) -> ClassificationRecipe:
    """A recipe whose "pretrained" weights, of three classes by timm's registry, lie in a file."""
    torch.save(open_checkpoint(source).state_dict("raw"), tmp_path / "weights.pth")
    overlay = f"model.args.pretrained_cfg_overlay={{file: {tmp_path / 'weights.pth'}, num_classes: 3}}"
    return recipe(folder, "model.weights=pretrained", overlay, *overrides)


def test_pretrained_weights_on_other_classes(
    source: Path,
    folder: Path,
    two_classes: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = timm.get_pretrained_cfg("vmamba_pico")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: replace(cfg, num_classes=3))
    same = pretrained(folder, source, tmp_path)
    expected = open_checkpoint(source).state_dict("raw")
    model = ClassificationTask(same).build_model(same)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not caplog.text

    changed = pretrained(two_classes, source, tmp_path)
    actual = ClassificationTask(changed).build_model(changed).state_dict()
    assert "the pretrained classifier is for 3 classes, the model's for 2: it starts anew" in caplog.text
    assert actual["head.fc.weight"].shape[0] == 2
    assert all(torch.equal(actual[name], expected[name]) for name in actual if not name.startswith("head."))

    strict = pretrained(two_classes, source, tmp_path, "model.new_classifier=false")
    with pytest.raises(CheckpointError, match="is for 3 classes, the model's for 2"):
        ClassificationTask(strict).build_model(strict)
    deeper = pretrained(two_classes, source, tmp_path, "model.args.depths=[1, 2]")
    with pytest.raises(CheckpointError, match=r"cannot be had, or do not fit: (.|\n)*stages\.1\.blocks\.1"):
        ClassificationTask(deeper).build_model(deeper)


def test_the_authors_average(source: Path, folder: Path, tmp_path: Path) -> None:
    raw, ema = (open_checkpoint(source).state_dict(kind) for kind in ("raw", "ema"))
    torch.save({"model": raw, "model_ema": ema}, tmp_path / "authors.pth")
    for kind, expected in (("auto", raw), ("raw", raw), ("ema", ema)):
        changed = recipe(folder, f"model.weights={tmp_path / 'authors.pth'}", f"model.weights_kind={kind}")
        actual = ClassificationTask(changed).build_model(changed).state_dict()
        assert all(torch.equal(actual[name], expected[name]) for name in actual)


def test_layer_wise_rates(folder: Path) -> None:
    """Each layer has a rate of 0.5 × that of the next; the classifier has the recipe's."""
    changed = recipe(folder, "optim.layer_decay=0.5", "schedule.warmup_epochs=0")
    task = ClassificationTask(changed)
    model = task.build_model(changed)
    optimizer = TaskModule(task, changed, model, 4).configure_optimizers()["optimizer"]
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: scales[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name["head.fc.weight"] == 1
    # A stage's first block and the downsampling before it are one layer, the last block and the norm too.
    layers = ["stem.", "stages.0.", ("stages.1.", "norm.")]
    for number, layer in enumerate(layers):
        actual = {value for name, value in by_name.items() if name.startswith(layer)}
        assert actual == {0.5 ** (len(layers) - number)}, layer
    assert by_name["norm.weight"] == 0.5


def test_muon_in_float32(folder: Path) -> None:
    """On a CPU the updates of matrices are formed in float32; timm's bfloat16 is 1e-2 away."""
    changed = recipe(folder, "optim.name=muon", "optim.weight_decay=0", "optim.lr=1")
    task = ClassificationTask(changed)
    model = task.build_model(changed)
    module = TaskModule(task, changed, model, 4)
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    weight = model.get_parameter("stages.0.blocks.0.op.in_proj.weight")
    before = weight.detach().clone()
    module.optimizer_step(0, 0, optimizer, lambda: None)
    actual = before - weight.detach()
    gradient = cast(Tensor, weight.grad)
    coefficients = muon.resolve_ns_coefficients("quintic", muon._COEFFICIENTS)
    for dtype, within in ((torch.float32, True), (torch.bfloat16, False)):
        expected = muon.zeropower_via_newtonschulz(gradient, 5, coefficients, dtype=dtype).float()
        distance = (actual / actual.norm() - expected / expected.norm()).norm()
        assert (distance < 1e-4) == within, dtype
