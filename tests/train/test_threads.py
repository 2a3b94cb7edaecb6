"""The number of threads that a run on a CPU chooses, records and keeps."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from images import make_folder, tiny_values
from vmamba.train import run
from vmamba.train.recipe import check, override_values
from vmamba.train.tasks.classification import ClassificationRecipe
from vmamba.train.threads import SMALL_WORK, work_of_a_layer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data"))


def recipe(data: Path, *overrides: str) -> Any:
    values = tiny_values(data)
    del values["train"]["threads"]
    settings = ("schedule.epochs=1", "schedule.warmup_epochs=0", "train.accelerator=cpu", *overrides)
    return check(ClassificationRecipe, override_values(values, settings), "test")


def recorded(out: Path) -> int | None:
    return yaml.safe_load((out / "recipe.yaml").read_text())["train"]["threads"]


def test_work_is_counted_by_layer_and_sample() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).train()
    assert work_of_a_layer(model, (4,), 10) == 10 * (4 * 6 + 6 * 2) / 2
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "args", "side", "small"),
    [
        ("vmamba_pico", {"stem_stride": 4}, 28, True),
        ("resnet18", {}, 28, False),
        ("vmamba_pico", {}, 224, False),
    ],
)
def test_which_models_are_small(name: str, args: dict[str, int], side: int, small: bool) -> None:
    model = timm.create_model(name, num_classes=10, **args)
    assert (work_of_a_layer(model, (3, side, side), 64) < SMALL_WORK) == small


def test_a_small_model_uses_one_thread_and_a_resume_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    used: list[int] = []
    fit = run.lightning.Trainer.fit

    def noted(*args: Any, **kwargs: Any) -> Any:
        used.append(torch.get_num_threads())
        return fit(*args, **kwargs)

    monkeypatch.setattr(run.lightning.Trainer, "fit", noted)
    run.train(recipe(data), tmp_path / "run")
    assert recorded(tmp_path / "run") == 1
    assert ", 1 thread\n" in (tmp_path / "run" / "log.txt").read_text()
    run.resume(tmp_path / "run")
    run.resume(tmp_path / "run", recipe=recipe(data))
    run.resume(tmp_path / "run", ["train.threads=2"])
    assert used == [1, 1, 1, 2]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("variable", "overrides", "expected"), [("2", (), None), (None, ("train.threads=2",), 2)]
)
def test_the_user_decides(
    variable: str | None,
    overrides: tuple[str, ...],
    expected: int | None,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(2)
    run.train(recipe(data, *overrides), tmp_path / "run")
    assert recorded(tmp_path / "run") == expected
    assert ", 2 threads\n" in (tmp_path / "run" / "log.txt").read_text()
