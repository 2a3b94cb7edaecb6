import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize, to_tensor

from images import COLOURS, make_folder, tiny_values
from vmamba.errors import CheckpointError, DataError, RecipeError
from vmamba.train import run
from vmamba.train.averaging import AveragedViews
from vmamba.train.confusion import ClassResult, draw_confusion, per_class
from vmamba.train.evaluation import Evaluation, evaluate, write_evaluation
from vmamba.train.guard import NonFiniteError
from vmamba.train.metrics import CalibrationError
from vmamba.train.predictions import draw_mistakes, most_confident_mistakes, predicted_classes
from vmamba.train.recipe import check, override_values
from vmamba.train.session import open_session
from vmamba.train.task import SamplePrediction
from vmamba.train.tasks.classification import ClassificationRecipe, ClassificationTask


def recipe(folder: Path, *overrides: str) -> ClassificationRecipe:
    return check(ClassificationRecipe, override_values(tiny_values(folder), overrides), "test")


@pytest.fixture(scope="module")
def averaged(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an average of its weights."""
    out = tmp_path_factory.mktemp("averaged")
    run.train(recipe(folder, "train.ema_decay=0.8"), out)
    return out


def logits_of(folder: Path, model: nn.Module, task: Any) -> tuple[Tensor, Tensor]:
    """By hand, an image at a time."""
    data = task.dataset("val")
    from vmamba.data import SampleKey

    samples = [data[SampleKey(0, index)] for index in range(len(data))]
    with torch.inference_mode():
        logits = torch.cat([model(image[None]) for image, _ in samples])
    return logits, torch.tensor([label for _, label in samples])


@pytest.mark.parametrize("size", [28, 224, 225, 384])
def test_the_papers_protocol(size: int, folder: Path) -> None:
    """The shorter side to ⌊256/224·S⌋, bicubic, and the crop from the middle."""
    values = {"task": "classification", "data": {"root": str(folder), "image_size": size}}
    transform = ClassificationTask(check(ClassificationRecipe, values, "test")).transform(training=False)
    image = Image.open(folder / "val" / "red" / "0.png")  # 20×16
    resized = to_tensor(resize(image, 256 * size // 224, InterpolationMode.BICUBIC))
    top, left = (round((side - size) / 2) for side in resized.shape[1:])
    crop = resized[:, top : top + size, left : left + size]
    mean, std = (
        torch.tensor(value)[:, None, None] for value in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    torch.testing.assert_close(transform(image), (crop - mean) / std)


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_scores_are_those_computed_by_hand(weights: Any, folder: Path, averaged: Path) -> None:
    actual = evaluate(averaged, weights=weights)
    session = open_session(averaged, weights=weights)
    logits, labels = logits_of(folder, session.model, session.task)
    right = logits.argmax(1) == labels
    assert (actual.weights, actual.samples, actual.skipped) == (weights, len(labels), [])
    assert actual.scores["top1"] == pytest.approx(right.float().mean().item())
    assert actual.scores["top5"] == 1  # of three classes
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    for true, predicted in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        confusion[true, predicted] += 1
    assert torch.equal(actual.tables["confusion"], confusion)
    confidence = logits.softmax(1).max(1).values
    error = 0.0
    for number in range(15):
        inside = (confidence >= number / 15) & (confidence < (number + 1) / 15)
        if inside.any():
            gap = (confidence[inside].mean() - right[inside].float().mean()).abs().item()
            error += gap * inside.float().mean().item()
    assert actual.scores["calibration_error"] == pytest.approx(error, abs=1e-5)


def test_the_average_is_taken_where_there_is_one(averaged: Path, folder: Path, tmp_path: Path) -> None:
    raw, ema, auto = (
        open_session(averaged, weights=kind).model.state_dict()  # type: ignore[arg-type]
        for kind in ("raw", "ema", "auto")
    )
    assert all(torch.equal(auto[name], ema[name]) for name in auto)
    assert not all(torch.equal(raw[name], ema[name]) for name in auto)
    run.train(recipe(folder, "schedule.epochs=2"), tmp_path)
    assert evaluate(tmp_path).weights == "raw"
    with pytest.raises(CheckpointError, match=r"best\.ckpt: has no 'ema' weights; it has 'raw'"):
        evaluate(tmp_path, weights="ema")


def test_the_best_weights_of_a_run_by_their_file(averaged: Path, tmp_path: Path) -> None:
    best = averaged / "best.safetensors"
    actual = evaluate(best)
    assert (actual.weights, actual.scores) == ("ema", evaluate(averaged).scores)
    with pytest.raises(CheckpointError, match=r"has no 'raw' weights; it has 'ema'"):
        evaluate(best, weights="raw")
    for name in ("best.safetensors", "config.json"):
        shutil.copy(averaged / name, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"vmamba eval RECIPE\.yaml model\.weights=.*best\.safetensors$"
    ):
        evaluate(tmp_path / best.name)


def test_missing_data_are_told_before_the_model_is_built(
    folder: Path, averaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_values(folder)))
    monkeypatch.setattr(ClassificationTask, "build_model", lambda *_: pytest.fail("the model is built"))
    weights = f"model.weights={averaged / 'best.safetensors'}"
    for what, overrides in ((averaged, []), (averaged / "best.safetensors", []), (path, [weights])):
        with pytest.raises(DataError, match="nowhere"):
            evaluate(what, [*overrides, f"data.root={tmp_path / 'nowhere'}"])


def test_a_recipe_names_the_weights(folder: Path, averaged: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    values = tiny_values(folder)
    values["data"]["train_split"] = "not_here"  # there may be no training images
    path.write_text(yaml.safe_dump(values))
    best = averaged / "checkpoints" / "best.ckpt"
    actual = evaluate(path, [f"model.weights={best}"])
    assert actual.scores == evaluate(averaged).scores
    for kind in ("raw", "ema"):
        named = evaluate(path, [f"model.weights={best}"], weights=kind)  # type: ignore[arg-type]
        assert (named.weights, named.scores) == (kind, evaluate(averaged, weights=kind).scores)  # type: ignore[arg-type]
    assert actual.weights == "ema"
    with pytest.raises(RecipeError, match="names no weights to judge"):
        evaluate(path)
    with pytest.raises(RecipeError, match="no average of the pretrained weights"):
        evaluate(path, ["model.weights=pretrained"], weights="ema")


def test_a_class_without_images_in_the_only_split(folder: Path, averaged: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "val", tmp_path / "val")
    for image in (tmp_path / "val" / "green").iterdir():
        image.unlink()
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_values(tmp_path)))
    evaluation = evaluate(path, [f"model.weights={averaged / 'checkpoints' / 'best.ckpt'}"])
    assert (evaluation.samples, evaluation.classes) == (12, ["blue", "green", "red"])


def test_a_classifier_that_is_not_the_datas_is_not_judged(
    folder: Path, averaged: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    root = make_folder(tmp_path / "images")
    path.write_text(yaml.safe_dump(tiny_values(root)))
    best = averaged / "checkpoints" / "best.ckpt"
    plain = tmp_path / "plain.pth"
    torch.save(open_session(averaged).model.state_dict(), plain)
    assert evaluate(path, [f"model.weights={plain}"]).scores == evaluate(averaged).scores
    with pytest.raises(CheckpointError, match="has no 'ema' weights; it has 'raw'"):
        evaluate(path, [f"model.weights={plain}"], weights="ema")
    (root / "val" / "red").rename(root / "val" / "purple")
    with pytest.raises(DataError, match=r"missing 'red', not expected 'purple'$"):
        evaluate(path, [f"model.weights={best}"])
    (root / "val" / "purple").rename(tmp_path / "purple")
    with pytest.raises(CheckpointError, match=r"head\.fc\.weight"):
        evaluate(path, [f"model.weights={plain}"])
    with pytest.raises(CheckpointError, match=r"plain\.pth: not the checkpoint of a run"):
        evaluate(plain)


@pytest.mark.parametrize("size", [32, 56, 224, 225, 384, 512])
def test_the_papers_crop(size: int, folder: Path) -> None:
    """Resize to ⌊256/224·S⌋, then the centre: the default crop_pct gives that at every size."""
    changed = recipe(folder, f"data.image_size={size}", "model={name: vmamba_tiny}")
    resize, crop = ClassificationTask(changed).transform(training=False).transforms[:2]
    assert (resize.size, tuple(crop.size)) == (256 * size // 224, (size, size))
    assert resize.interpolation.value == "bicubic"


def test_calibration_of_known_logits() -> None:
    """A batch of logits from 0 to 1 is not of probabilities, and a confidence of 1 lies in the last bin."""
    small, sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[200.0, 0.0], [3.0, 0.0]])
    metric = CalibrationError(2, n_bins=15, norm="l1")
    metric.update(small, torch.tensor([0, 0]))
    metric.update(sure, torch.tensor([1, 0]))
    low, high = torch.tensor(1.0).sigmoid().item(), torch.tensor(3.0).sigmoid().item()
    # Two of confidence 0.73, one of them right; two above 14/15, one of them right.
    expected = 0.5 * abs(low - 0.5) + 0.5 * abs((1 + high) / 2 - 0.5)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(NonFiniteError, match="outputs are not finite"):
        metric.update(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))


class Linear(nn.Module):
    """Of the mean colour at the left: mirror images differ."""

    def forward(self, images: Tensor) -> Tensor:
        return 3 * images[..., : images.shape[-1] // 2].mean((2, 3)) + images.shape[-1] / 10


def test_averaged_views() -> None:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = Linear()
    plain = AveragedViews(model)(images)
    torch.testing.assert_close(plain.exp(), model(images).softmax(1))
    larger = nn.functional.interpolate(images, (20, 20), mode="bicubic", antialias=True)
    views = [images, images.flip(3), larger, larger.flip(3)]
    expected = torch.stack([model(view).softmax(1) for view in views]).mean(0)
    actual = AveragedViews(model, flip=True, scales=[1.0, 1.25])(images)
    torch.testing.assert_close(actual.exp(), expected)


def test_a_view_that_the_model_refuses() -> None:
    def refuse(images: Tensor) -> Tensor:
        raise AssertionError("expected 16×16")

    model = Linear()
    model.forward = refuse  # type: ignore[method-assign]
    with pytest.raises(RecipeError, match=r"does not take a view of 8×8: expected 16×16"):
        AveragedViews(model, scales=[0.5])(torch.zeros(1, 3, 16, 16))


def test_averaging_in_an_evaluation(averaged: Path) -> None:
    plain = evaluate(averaged)
    actual = evaluate(averaged, flip=True, scales=(1.0, 1.25))
    assert actual.scores["calibration_error"] != plain.scores["calibration_error"]
    assert actual.samples == plain.samples
    for scales in ((), (0.0,), (1.0, -1.0), (float("nan"),), (float("inf"),)):
        with pytest.raises(RecipeError, match="scales: expected numbers above 0"):
            evaluate(averaged, scales=scales)


def test_files(averaged: Path, tmp_path: Path) -> None:
    actual = evaluate(averaged)
    write_evaluation(actual, tmp_path / "report")
    values = json.loads((tmp_path / "report" / "results.json").read_text())
    assert values["scores"] == actual.scores
    with (tmp_path / "report" / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == sorted(COLOURS)
    assert sum(int(row["samples"]) * float(row["accuracy"]) for row in rows) == pytest.approx(
        actual.scores["top1"] * actual.samples
    )
    with (tmp_path / "report" / "confusion.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert [[int(value) for value in row[1:]] for row in table[1:]] == actual.tables["confusion"].tolist()
    assert (tmp_path / "report" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_prediction_and_the_mistakes(averaged: Path, folder: Path, tmp_path: Path) -> None:
    """As computed by hand, an image at a time; mistakes with the most confident first."""
    assert evaluate(averaged).predictions == []
    write_evaluation(evaluate(averaged, keep_predictions=True), tmp_path)
    session = open_session(averaged)
    logits, labels = logits_of(folder, session.model, session.task)
    names = sorted(COLOURS)
    rows = rows_of(tmp_path / "predictions.csv")
    files = sorted((folder / "val").glob("*/*.png"))
    assert [row["image"] for row in rows] == [str(path) for path in files]
    for row, label, probabilities in zip(rows, labels.tolist(), logits.softmax(1), strict=True):
        order = probabilities.argsort(descending=True).tolist()
        suffixes = ["", "_2", "_3"]
        assert row["true_class"] == names[label]
        assert [row[f"predicted_class{suffix}"] for suffix in suffixes] == [names[i] for i in order]
        expected = [probabilities[label].item(), *probabilities[order].tolist()]
        columns = ["true_class_probability", *(f"probability{suffix}" for suffix in suffixes)]
        assert [float(row[column]) for column in columns] == pytest.approx(expected, abs=1e-5)
    wrong = [row for row in rows if row["predicted_class"] != row["true_class"]]
    mistakes = rows_of(tmp_path / "mistakes.csv")
    assert mistakes == sorted(wrong, key=lambda row: -float(row["probability"]))
    assert (tmp_path / "mistakes.png").exists() == bool(mistakes)


@pytest.mark.skipif(os.name != "posix", reason="file names of any bytes")
def test_predictions_of_names_of_any_kind(averaged: Path, tmp_path: Path) -> None:
    """Class names as CSV must quote them, a file's name that is not UTF-8, an image of an unreadable file."""
    root = make_folder(tmp_path / "images", each=2)
    renamed = {"blue": 'a, "b"', "green": "a\nb", "red": "\u6570\u5b57"}
    for split in ("train", "val"):
        for old, new in renamed.items():
            (root / split / old).rename(root / split / new)
        os.rename(
            root / split / renamed["blue"] / "0.png",
            os.fsencode(root / split / renamed["blue"]) + b"/\xff.png",
        )
    (root / "val" / renamed["red"] / "1.png").write_bytes(b"no image")
    odd = ["schedule.epochs=1", "schedule.warmup_epochs=0", "train.on_error=skip", "optim.lr=1.0e-9"]
    run.train(recipe(root, *odd), tmp_path / "run")
    evaluation = evaluate(tmp_path / "run", keep_predictions=True)
    write_evaluation(evaluation, tmp_path / "report")
    rows = rows_of(tmp_path / "report" / "predictions.csv")
    assert [(row["true_class"], Path(row["image"]).name) for row in rows] == [
        ("a\nb", "0.png"),
        ("a\nb", "1.png"),
        ('a, "b"', "1.png"),
        ('a, "b"', "\\xff.png"),
        ("\u6570\u5b57", "0.png"),
    ]
    assert [each.index for each in evaluation.predictions] == [0, 1, 2, 3, 4]
    assert (tmp_path / "report" / "mistakes.png").read_bytes().startswith(b"\x89PNG")  # all one class


def test_the_most_confident_mistakes_come_first(tmp_path: Path) -> None:
    logits = torch.tensor([[3.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0]])
    predicted = predicted_classes(logits, torch.tensor([0, 1, 2, 1]))
    assert predicted[3].classes == [0, 1, 2]  # of equals the first, as argmax has it
    samples = [SamplePrediction(n, f"{n}.png", value) for n, value in enumerate(predicted)]
    mistakes = most_confident_mistakes(samples)
    assert [each.index for each in mistakes] == [2, 1, 3]
    picture = tmp_path / "mistakes.png"
    draw_mistakes(mistakes, ["a", "b", "c"], lambda index: Image.new("RGB", (20, 16)), picture)
    with Image.open(picture) as sheet:
        assert sheet.size[0] > 2 * 176  # two columns for three images
    draw_mistakes([], ["a", "b", "c"], Image.open, picture)
    assert not picture.exists()  # that of an earlier evaluation


def test_predictions_that_are_not_finite_are_not_written(averaged: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "vmamba.train.tasks.classification._logits",
        lambda model, images: torch.full((len(images), 3), float("nan")),
    )
    with pytest.raises(NonFiniteError, match="not finite"):
        evaluate(averaged, keep_predictions=True)


def test_a_class_without_samples(tmp_path: Path) -> None:
    confusion = torch.tensor([[3, 1], [0, 0]])
    rows = per_class(confusion, ["a", "b"])
    assert rows == [
        ClassResult("a", 4, accuracy=0.75, precision=1, mistaken_for="b", mistaken_for_share=0.25),
        ClassResult("b", 0, accuracy=None, precision=0, mistaken_for="", mistaken_for_share=0),
    ]
    draw_confusion(confusion, ["a", "b"], tmp_path / "small.png")
    draw_confusion(torch.eye(1001, dtype=torch.int64), [str(n) for n in range(1001)], tmp_path / "large.png")
    assert (tmp_path / "large.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_images_are_counted(averaged: Path, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    bad = root / "val" / "red" / "2.png"
    bad.write_bytes(bad.read_bytes()[:100])
    actual: Evaluation = evaluate(averaged, [f"data.root={root}", "train.on_error=skip"])
    assert actual.samples == 17
    assert len(actual.skipped) == 1
    assert str(bad) in actual.skipped[0]
    assert actual.tables["confusion"].sum() == 17


def test_data_without_one_good_image(averaged: Path, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", each=1)
    for path in (root / "val").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"not one sample can be read, the first: .*0\.png"):
        evaluate(averaged, [f"data.root={root}", "train.on_error=skip"])


def test_a_checkpoint_brings_its_own_model(averaged: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"override 'model.weights=other': the model is that of .*best\.ckpt"
    ):
        evaluate(averaged, ["model.weights=other"])


def test_names_that_a_picture_cannot_show_as_they_are(tmp_path: Path) -> None:
    """No formulas, and no warning of a script that the font lacks; cells and colour bar both in %."""
    names = [r"$\frac$", "a$b", "数字", "😀"]
    draw_confusion(10 * torch.eye(4, dtype=torch.int64), names, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("number", [3, 40], ids=["labelled", "too many for labels"])
def test_the_colour_bar_is_in_percent_as_the_cells(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    confusion = 3 * torch.eye(number, dtype=torch.int64)
    confusion[0, 1] = 1
    draw_confusion(confusion, [str(n) for n in range(number)], tmp_path / "picture.png")
    cells, bar = figures[0].axes
    (image,) = cells.images
    assert (bar.get_ylabel(), image.get_clim()) == ("% of the true class", (0, 100))
    assert cells.get_title() == "How each class is predicted"
    labels = (cells.get_xlabel(), cells.get_ylabel())
    if number == 3:
        assert labels == ("predicted class", "true class (samples)")
        assert [label.get_text() for label in cells.get_yticklabels()] == ["0 (4)", "1 (3)", "2 (3)"]
    else:
        assert labels == ("predicted class, by number", "true class, by number")
    assert image.get_array()[0, :2].tolist() == [75, 25]
    texts = [text.get_text() for text in cells.texts]
    assert texts == (["75", "25", "100", "100"] if number == 3 else [])


def test_one_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    for split in ("train", "val"):
        for name in ("blue", "green"):
            (root / split / name).rename(tmp_path / f"{split} {name}")
    outcome = run.train(recipe(root, "schedule.epochs=1", "schedule.warmup_epochs=0"), tmp_path / "run")
    assert outcome.scores["val/top1"] == 1
    evaluation = evaluate(tmp_path / "run")
    assert (evaluation.scores["top1"], evaluation.samples) == (1, 6)
    write_evaluation(evaluation, tmp_path / "report")
    assert (tmp_path / "report" / "confusion.csv").read_text().splitlines()[1] == "red,6"
