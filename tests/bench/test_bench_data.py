import logging
from collections import Counter
from typing import Any

import pytest

from images import make_folder, tiny_values
from vmamba.bench.data import Loading, bench_loader, bench_step, verdict
from vmamba.train import module
from vmamba.train.recipe import check, override_values
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> ClassificationRecipe:
    folder = make_folder(tmp_path_factory.mktemp("images"))
    changed = override_values(tiny_values(folder), ["train.micro_batch_size=2", "train.ema_decay=0.9"])
    return check(ClassificationRecipe, changed, "test")


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader(workers: int, recipe: ClassificationRecipe) -> None:
    """More batches than an epoch has."""
    actual = bench_loader(recipe, workers, batches=25)
    assert actual.workers == workers
    assert 0 < actual.low <= actual.high
    assert actual.images_per_second > 0


def test_the_step(recipe: ClassificationRecipe) -> None:
    assert bench_step(recipe, rounds=1) > 0


def test_lightning_says_nothing(recipe: ClassificationRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
    bench_loader(recipe, 0, batches=5)
    bench_step(recipe, rounds=1)
    assert told == []


def test_the_step_is_that_of_training(recipe: ClassificationRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the update that training makes, the passes of a step, clipping and the average."""
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (module, "muon_in_float32"),
        (module.TaskModule, "configure_gradient_clipping"),
        (module.ModelEmaV3, "update"),
        (ClassificationTask, "augment_batch"),
        (ClassificationTask, "training_step"),
    ):
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    changed = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"name": "nmuon"})})
    assert bench_step(changed, rounds=1) > 0
    steps, passes = 3, 2
    assert calls == {
        "muon_in_float32": steps,
        "configure_gradient_clipping": steps,
        "update": steps,
        "augment_batch": steps * passes,
        "training_step": steps * passes,
    }


def test_who_is_slower() -> None:
    loadings = [Loading(0, 100, 90, 110), Loading(2, 220, 200, 240), Loading(4, 400, 380, 420)]
    assert verdict(loadings, 150, 8).startswith(
        "the model is the slower one, 150 images/s: 2 workers, 220 images/s, keep up"
    )
    assert verdict(loadings, 1000, 8).startswith(
        "the data are the slower ones: 400 images/s with 4 workers, and the model takes 1,000"
    )
    assert "take turns: 33 together" in verdict(loadings[:1], 50, 8)
