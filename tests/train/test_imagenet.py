"""The ImageNet recipes hold what the paper says, and run on a miniature in every form of the data."""

from pathlib import Path

import pytest
import torch

from images import make_folder
from vmamba.data.pack import write_shards, write_tar
from vmamba.models.checkpoints import read_checkpoint
from vmamba.train import run
from vmamba.train.session import load_recipe
from vmamba.train.tasks.classification import ClassificationTask

RECIPES = Path(__file__).parents[2] / "recipes" / "imagenet"
DROP_PATH = {
    "vmamba_tiny_s2l5": 0.2,
    "vmamba_small_s2l15": 0.3,
    "vmamba_base_s2l15": 0.6,
    "vmamba_tiny_s1l8": 0.2,
    "vmamba_small_s1l20": 0.3,
    "vmamba_base_s1l20": 0.5,
    "vanilla_vmamba_tiny": 0.2,
    "vanilla_vmamba_small": 0.3,
    "vanilla_vmamba_base": 0.6,
}
"""By model, section 5.1."""


def test_a_recipe_for_each_model() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == DROP_PATH.keys()


@pytest.mark.parametrize("name", DROP_PATH)
def test_values_of_the_paper(name: str) -> None:
    """Section 5.1; rates are 5e-4, 5e-7 and 5e-6 for 512 images."""
    recipe = ClassificationTask.resolve(load_recipe(RECIPES / f"{name}.yaml")).model_dump()  # type: ignore[arg-type]
    scale = recipe["train"]["batch_size"] / 512
    ema = None if name == "vanilla_vmamba_tiny" else 0.9999
    expected = {
        "model": {"name": name, "args": {"drop_path_rate": DROP_PATH[name]}, "weights": None},
        "data": {"image_size": 224, "interpolation": "bicubic", "crop_pct": 224 / 256},
        "augment": {
            "auto_augment": "rand-m9-mstd0.5-inc1",
            "color_jitter": 0.4,
            "random_erasing": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
            "mixup_prob": 1.0,
            "mixup_switch_prob": 0.5,
            "label_smoothing": 0.1,
            "scale": (0.08, 1.0),
            "ratio": (3 / 4, 4 / 3),
            "hflip": 0.5,
        },
        "optim": {
            "name": "adamw",
            "lr": 5e-4 * scale,
            "betas": (0.9, 0.999),
            "weight_decay": 0.05,
            "decay": "paper",
            "clip_grad": 5.0,
            "layer_decay": None,
        },
        "schedule": {
            "epochs": 300,
            "warmup_epochs": 20,
            "warmup_lr": 5e-7 * scale,
            "min_lr": 5e-6 * scale,
        },
        "train": {"batch_size": 1024, "precision": "16-mixed", "ema_decay": ema, "ema_warmup": False},
    }
    for section, values in expected.items():
        assert {key: recipe[section][key] for key in values} == values, section


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as a folder, as tars and as shards."""
    place = tmp_path_factory.mktemp("imagenet")
    folder = make_folder(place / "folder")
    (place / "tar").mkdir()
    for split in ("train", "val"):
        write_tar(folder / split, place / "tar" / f"{split}.tar")
        write_shards(folder / split, place / "shards", split, samples=7)
    return place


FORMS = {
    "folder": [],
    "tar": ["data.source=tar", "data.train_split=train.tar", "data.val_split=val.tar"],
    "shards": [
        "data.source=webdataset",
        "data.train_split=train-{000000..000002}.tar",
        "data.val_split=val-*.tar",
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_miniature(form: str, place: Path, tmp_path: Path) -> None:
    smaller = [
        "data.image_size=32",
        "train.batch_size=8",
        "train.micro_batch_size=4",
        "train.workers=1",
        "schedule.epochs=2",
        "schedule.warmup_epochs=1",
        "model.args={drop_path_rate: 0.2, depths: [1, 1], dims: [8, 16], stem_stride: 4}",
    ]
    where = [f"data.root={place / form}"]
    if form == "shards":
        where.append(f"data.classes={place / form / 'classes.txt'}")
    recipe = load_recipe(RECIPES / "vmamba_tiny_s2l5.yaml", [*where, *FORMS[form], *smaller])
    scores = run.train(recipe, tmp_path).scores
    kinds = ("", "ema_")
    assert scores.keys() == {f"val/{kind}{name}" for kind in kinds for name in ("loss", "top1", "top5")}
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 4
    assert checkpoint["MixedPrecision"]["scale"] > 0
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    rates = [group["weight_decay"] for group in checkpoint["optimizer_states"][0]["param_groups"]]
    assert sorted(rates) == [0, 0.05]


def test_what_decays(place: Path, tmp_path: Path) -> None:
    """By the paper, of the scan's parameters D alone is free; clean, A and the bias of delta are too."""
    from vmamba.train.module import TaskModule

    for decay, free in (("paper", {"D"}), ("clean", {"D", "A_log", "dt_bias"})):
        recipe = load_recipe(
            RECIPES / "vmamba_tiny_s2l5.yaml",
            [f"data.root={place / 'folder'}", f"optim.decay={decay}", "train.ema_decay=null"],
        )
        task = ClassificationTask(recipe)  # type: ignore[arg-type]
        with torch.device("meta"):
            model = task.build_model(recipe)
        groups = TaskModule(task, recipe, model, 10).configure_optimizers()["optimizer"].param_groups
        decayed = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        for name, parameter in model.named_parameters():
            last = name.rpartition(".")[2]
            if last in ("A_log", "D", "dt_bias"):
                assert decayed[id(parameter)] == (0 if last in free else 0.05), name
            else:
                assert decayed[id(parameter)] == (0 if parameter.ndim == 1 else 0.05), name
