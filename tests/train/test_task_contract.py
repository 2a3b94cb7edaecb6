"""A task of another shape than classification goes through the same code, without a case for it anywhere.

Points are looked for in images: samples and targets are dicts, a model is a wrapper around a VMamba, the
metric gives a table, the score that chooses the best checkpoint falls, and a run counts steps, not epochs.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

import vmamba
from images import assert_same
from vmamba import VMamba
from vmamba.config import Section
from vmamba.data import Preprocessing, SampleKey, seeded
from vmamba.inference import Prediction, Predictor
from vmamba.models.checkpoints import read_checkpoint
from vmamba.train import run, tasks
from vmamba.train.curves import read_metrics
from vmamba.train.evaluation import evaluate, write_evaluation
from vmamba.train.recipe import Recipe
from vmamba.train.runs import find_runs
from vmamba.train.session import load_recipe, open_session
from vmamba.train.task import Task

STEPS = 10


class PointsData(Section):
    samples: int = 20
    side: int | None = None


class PointsRecipe(Recipe):
    task: Literal["points"] = "points"
    data: PointsData = PointsData()


class Points:
    """Images with one to three bright pixels."""

    def __init__(self, number: int, side: int, seed: int) -> None:
        self.number, self.side, self.seed = number, side, seed

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        with seeded("points", self.seed, key.epoch, key.index):
            points = torch.rand(int(torch.randint(1, 4, ())), 2)
            image = 0.1 * torch.randn(3, self.side, self.side)
        for x, y in (points * self.side).long().tolist():
            image[:, y, x] += 3
        return {"image": image, "target": {"points": points, "id": key.index}}

    def name(self, index: int) -> str:
        return f"points/{index}"


class Finder(nn.Module):
    """A detector's shape: in training it takes targets and gives losses, in evaluation a dict an image."""

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"backbone": backbone})
        self.head = nn.Linear(width, 2)

    def forward(self, images: list[Tensor] | Tensor, targets: list[dict[str, Any]] | None = None) -> Any:
        images = torch.stack(images) if isinstance(images, list) else images
        centres = self.head(self.body["backbone"](images))
        if targets is None:
            return [{"centre": centre} for centre in centres]
        expected = torch.stack([target["points"].mean(0) for target in targets])
        return {"distance": F.mse_loss(centres, expected), "size": 1e-3 * centres.square().mean()}


class Errors(Metric):
    """The mean error, and a table of it by the number of points."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(4), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(4), dist_reduce_fx="sum")

    def update(self, answers: list[dict[str, Tensor]], targets: list[dict[str, Any]]) -> None:
        for answer, target in zip(answers, targets, strict=True):
            number = len(target["points"])
            self.sums[number] += (answer["centre"] - target["points"].mean(0)).norm()
            self.counts[number] += 1

    def compute(self) -> dict[str, Tensor]:
        return {"error": self.sums.sum() / self.counts.sum(), "by_number": self.sums / self.counts.clamp(1)}


@dataclass(frozen=True)
class Centre(Prediction):
    x: float
    y: float

    def text(self) -> str:
        return f"({self.x:.2f}, {self.y:.2f})"


class CentrePredictor(Predictor):
    task = "points"

    def decode(self, outputs: Any, names: Sequence[str | None], top: int | None) -> list[Prediction]:
        pairs = zip(names, outputs, strict=True)
        return [Centre(name, *answer["centre"].tolist()) for name, answer in pairs]


class PointsTask(Task):
    name = "points"
    recipe_type = PointsRecipe
    monitor = "error"
    monitor_mode = "min"

    def __init__(self, recipe: PointsRecipe, classes: Sequence[str] | None = None) -> None:
        self.recipe: Any = self.resolve(recipe)
        side = self.recipe.data.side
        self.preprocessing = Preprocessing.of_model({}, size=(side, side))
        self.classes = []

    @classmethod
    def resolve(cls, recipe: PointsRecipe) -> PointsRecipe:
        side = recipe.data.side or 32
        return recipe.model_copy(update={"data": recipe.data.model_copy(update={"side": side})})

    def dataset(self, split: Literal["train", "val"]) -> Points:
        data = self.recipe.data
        return Points(data.samples if split == "train" else 6, data.side, split == "val")

    def collate(self) -> Callable[[list[Any]], Any]:
        return lambda samples: {
            "images": [sample["image"] for sample in samples],
            "targets": [sample["target"] for sample in samples],
        }

    def build_model(self, recipe: PointsRecipe) -> nn.Module:
        backbone = VMamba(num_classes=0, depths=(1, 1), dims=(8, 16), drop_path_rate=0.3)
        return Finder(backbone, 16)

    def training_step(self, model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
        losses = model(batch["images"], batch["targets"])
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    def metrics(self) -> Errors:
        return Errors()

    def validation_step(self, model: nn.Module, batch: Any, metrics: Any) -> Mapping[str, Tensor]:
        metrics.update(model(batch["images"]), batch["targets"])
        losses = model(batch["images"], batch["targets"])
        return {"loss": torch.stack(list(losses.values())).sum()}

    def predictor(self, model: nn.Module) -> CentrePredictor:
        return CentrePredictor(model, self.preprocessing, [])


def values(**train: Any) -> dict[str, Any]:
    return {
        "task": "points",
        "optim": {"lr": 1e-3, "layer_decay": 0.5},
        "schedule": {"name": "polynomial", "steps": STEPS, "warmup_steps": 2, "power": 0.9},
        "train": {"batch_size": 6, "micro_batch_size": 3, "workers": 0, "threads": 1, **train},
    }


def write_recipe(folder: Path) -> Path:
    # An epoch has three steps: evaluations and checkpoints fall within epochs, and at their ends.
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values(eval_every_steps=4, checkpoint_every=3, ema_decay=0.5)))
    return path


@pytest.fixture(scope="module", autouse=True)
def registered() -> Any:
    """All that a new task asks for beside its module is a line in this table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "points", f"{__name__}:PointsTask")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("points")
    run.train(load_recipe(write_recipe(out)), out)
    return out


def state(folder: Path) -> dict[str, Tensor]:
    return read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]


def rows(folder: Path) -> list[dict[str, str]]:
    """But for the speed."""
    return [
        {name: value for name, value in row.items() if name != "images/s"}
        for row in read_metrics(folder / "metrics.csv")
    ]


def test_trained(whole: Path) -> None:
    actual = rows(whole)
    assert [(row["epoch"], row["step"]) for row in actual] == [("2", "4"), ("3", "8"), ("4", "10")]
    expected = {"train/loss", "train/distance", "train/size"}
    expected |= {f"val/{kind}{name}" for kind in ("", "ema_") for name in ("loss", "error")}
    assert actual[0].keys() == {"epoch", "step", "lr"} | expected
    # A straight line to the power of 0.9 behind the warm-up.
    for row in actual:
        progress = (int(row["step"]) - 2) / (STEPS - 2)
        assert float(row["lr"]) == pytest.approx(5e-6 + (1e-3 - 5e-6) * (1 - progress) ** 0.9, rel=1e-4)
    (described,) = find_runs(whole)
    errors = [float(row["val/ema_error"]) for row in actual]
    assert (described.state, described.unit, described.length, described.step) == (
        "finished",
        "steps",
        10,
        10,
    )
    assert described.best == min(errors)
    assert described.best_epoch == int(actual[errors.index(min(errors))]["epoch"])
    assert load_recipe(whole / "recipe.yaml").data.side == 32  # type: ignore[attr-defined]
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "best.safetensors").exists()


def test_the_best_checkpoint_has_the_lowest_error(whole: Path) -> None:
    errors = {row["step"]: float(row["val/ema_error"]) for row in rows(whole)}
    best = read_checkpoint(whole / "checkpoints" / "best.ckpt")
    assert str(best["global_step"]) == min(errors, key=lambda step: errors[step])


KILLED = """
import sys
import pytest
sys.path.insert(0, {here!r})
import test_task_contract as contract
from vmamba.train import run, tasks
from vmamba.train.session import load_recipe
tasks.TASKS["points"] = "test_task_contract:PointsTask"
step, calls = contract.PointsTask.training_step, [0]
def counted(self, model, batch):
    calls[0] += 1
    if calls[0] == {call}:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, model, batch)
contract.PointsTask.training_step = counted
run.train(load_recipe({recipe!r}), {out!r})
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("call", [8, 12, 19], ids=["in step 4", "in step 6", "in step 10"])
def test_a_killed_run_ends_with_the_same_bits(call: int, whole: Path, tmp_path: Path) -> None:
    """Each step is of two passes."""
    here = Path(__file__).parent
    code = KILLED.format(
        here=str(here), call=call, recipe=str(write_recipe(tmp_path)), out=str(tmp_path / "run")
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    # The last checkpoint: of step 3, 4 or 9.
    run.resume(tmp_path / "run")
    assert_same(state(tmp_path / "run"), state(whole))
    assert rows(tmp_path / "run") == rows(whole)


def test_evaluated_and_reported(whole: Path, tmp_path: Path) -> None:
    evaluation = evaluate(whole)
    assert evaluation.weights == "ema"
    best = min(float(row["val/ema_error"]) for row in rows(whole))
    assert evaluation.scores["error"] == pytest.approx(best, abs=1e-5)
    assert evaluation.tables["by_number"].shape == (4,)
    write_evaluation(evaluation, tmp_path)
    tables = json.loads((tmp_path / "tables.json").read_text())
    assert tables["by_number"] == evaluation.tables["by_number"].tolist()


def test_predicted(whole: Path) -> None:
    """From the run, from its file of weights, and by the task itself."""
    images = [Image.new("RGB", (40, 30), colour) for colour in ((200, 10, 10), (10, 10, 200))]
    expected = open_session(whole).predictor()(images)
    assert [type(each) for each in expected] == [Centre, Centre]
    assert expected[0] != expected[1]
    for source in (whole, whole / "best.safetensors"):
        assert vmamba.load(source)(images) == expected


def test_groups_are_gathered_from_inside_the_wrapper(whole: Path) -> None:
    session = open_session(whole)
    from vmamba.train.optim import parameter_groups

    groups = parameter_groups(session.model, session.recipe.optim)
    of = {id(p): group for group in groups for p in group["params"]}
    names = dict(session.model.named_parameters())
    assert of.keys() == {id(parameter) for parameter in names.values()}
    for name, parameter in names.items():
        group, last = of[id(parameter)], name.rpartition(".")[2]
        free = parameter.ndim == 1 or last in ("A_log", "D", "dt_bias")
        assert group["weight_decay"] == (0 if free else 0.05), name
        # Layers: stem, the first stage, the second with the norm; the head outside has the full rate.
        layer = next(
            (i for i, key in enumerate((".stem.", ".stages.0.", ".stages.1.", ".norm.")) if key in name), 4
        )
        assert group["lr_scale"] == pytest.approx(0.5 ** (3 - min(layer, 2)) if layer < 4 else 1), name
