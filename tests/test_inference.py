"""Predictors: the answers of evaluation, from every kind of source and image, without what training needs."""

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import vmamba
from authors import authors_names
from images import COLOURS, make_folder
from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import CheckpointError, DataError, MissingCheckpointError, ModelError
from vmamba.inference import Classification, ClassificationPredictor, FailedImage, Prediction
from vmamba.models.checkpoints import seal
from vmamba.pretrained import BEST, model_config, save_pretrained, set_configuration

ARGS = {"depths": (1, 1), "dims": (8, 16), "stem_stride": 4}
CLASSES = sorted(COLOURS)
PREPROCESSING = Preprocessing(
    size=(40, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), crop_pct=0.8, interpolation="bilinear"
)


def small(**changes: Any) -> Any:
    torch.manual_seed(3)
    model = timm.create_model("vmamba_pico", **{**ARGS, "num_classes": 3, **changes})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = make_folder(tmp_path_factory.mktemp("photos"), each=2)
    return sorted((root / "val").rglob("*.png"))


def probabilities(model: nn.Module, images: list[Path], preprocessing: Preprocessing) -> Tensor:
    """By hand: timm's transform, the model, softmax."""
    transform = preprocessing.transform()
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in images])
    with torch.no_grad():
        return model(batch).softmax(1)


def scores(prediction: Classification, classes: list[str] = CLASSES) -> list[float]:
    by_label = {each.label: each.score for each in prediction.classes}
    return [by_label[name] for name in classes]


@pytest.fixture(scope="module")
def predictor() -> ClassificationPredictor:
    return ClassificationPredictor(small(), PREPROCESSING, CLASSES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = small()
    save_pretrained(folder, model, model_config(model, PREPROCESSING, CLASSES, model_args=ARGS))
    return folder


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_are_the_models(
    batch_size: int, predictor: ClassificationPredictor, photos: list[Path]
) -> None:
    answers = predictor(photos, batch_size=batch_size)
    expected = probabilities(predictor.model, photos, PREPROCESSING)
    torch.testing.assert_close(torch.tensor([scores(answer) for answer in answers]), expected)
    assert [answer.image for answer in answers] == [str(path) for path in photos]
    for answer, row in zip(answers, expected, strict=True):
        assert answer.classes[0].label == CLASSES[int(row.argmax())]
        assert [each.score for each in answer.classes] == sorted(scores(answer), reverse=True)


def test_it_says_what_it_is(predictor: ClassificationPredictor) -> None:
    assert repr(predictor) == (
        "ClassificationPredictor(vmamba_pico, classes=3 ('blue', 'green', 'red'), input=3x40x32, "
        "device='cpu', dtype=torch.float32)"
    )
    many = ClassificationPredictor(nn.Linear(2, 9).half(), PREPROCESSING, [*CLASSES, *"abcdef"])
    assert "(Linear, classes=9 ('blue', 'green', 'red' and 6 more), " in repr(many)
    assert repr(many).endswith("dtype=torch.float16)")


def test_every_kind_of_image(predictor: ClassificationPredictor, photos: list[Path]) -> None:
    path = photos[0]
    image = Image.open(path)
    array = np.asarray(image)
    expected = asdict(predictor(path))["classes"]
    chw = torch.from_numpy(array.copy()).permute(2, 0, 1)
    preprocessed = predictor.transform(image.convert("RGB"))
    for form in (str(path), image, array, chw, preprocessed):
        assert asdict(predictor(form))["classes"] == expected, type(form)
        (answer,) = predictor([form])
        assert asdict(answer)["classes"] == expected
    for batch in (array[None], chw[None], preprocessed[None], iter([path])):
        (answer,) = predictor(batch)
        assert asdict(answer)["classes"] == expected
    gray = np.asarray(image.convert("L"))
    assert predictor(gray).classes == predictor(gray[:, :, None]).classes


def test_the_likeliest_alone(predictor: ClassificationPredictor, photos: list[Path]) -> None:
    whole = predictor(photos[0], top=None)
    assert len(whole.classes) == 3
    assert predictor(photos[0], top=1).classes == whole.classes[:1]
    assert predictor(photos[0], top=1).text().startswith(whole.classes[0].label)
    for wrong in ({"top": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="expected at least 1, got 0"):
            predictor([photos[0]], **wrong)


def test_damaged_images_do_not_lose_the_others(
    predictor: ClassificationPredictor, photos: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photos[0].read_bytes()[:60])
    images: list[Any] = [broken, photos[0], tmp_path / "none.png", 3, np.zeros((4, 4)), photos[1]]
    answers = predictor(images, batch_size=2)
    assert [isinstance(answer, FailedImage) for answer in answers] == [True, False, True, True, True, False]
    assert answers[1] == predictor(photos[0])
    assert "broken.png: not an image" in answers[0].error
    assert "none.png: no such image" in answers[2].error
    assert "got int" in answers[3].error
    assert "of float64" in answers[4].error
    with pytest.raises(DataError, match=r"broken\.png: not an image"):
        predictor(broken)
    with pytest.raises(DataError, match=r"tensor: expected \(3, height, width\), preprocessed"):
        predictor(torch.zeros(1, 32, 32))
    assert predictor([]) == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 0, 3), np.uint8), r"^array: it has no pixels, its shape is \(0, 0, 3\)"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), "^tensor: it has no pixels"),
        (torch.zeros(3, 0, 0), r"^tensor: it has no pixels, its shape is \(3, 0, 0\)"),
        (
            np.zeros((3, 20, 16), np.uint8),
            r"^array: 16 channels, .*expected \(height, width, channels\), which array\.transpose\(1, 2, 0\)",
        ),
        (
            torch.zeros(20, 16, 3, dtype=torch.uint8),
            r"^tensor: 20 channels, .*expected \(channels, height, width\), which tensor\.permute\(2, 0, 1\)",
        ),
        (np.zeros((4, 4, 3), np.float32), r"of float32; if its values are from 0 to 1: \(array \* 255\)"),
        (np.zeros((4, 4, 3), np.int64), "of int64$"),
        (torch.zeros(3, 5, 4, dtype=torch.int64), r"^tensor: expected .*, got \(3, 5, 4\) of int64$"),
    ],
)
def test_images_of_a_wrong_form(image: Any, message: str, predictor: ClassificationPredictor) -> None:
    with pytest.raises(DataError, match=message):
        predictor(image)


@pytest.mark.parametrize("images", [None, 3, 3.5, object()])
def test_what_is_no_image(images: Any, predictor: ClassificationPredictor) -> None:
    kind = type(images).__name__
    message = f"expected a path, an image, an array or a tensor, or several of these, got {kind}"
    for call in (predictor, predictor.stream):
        with pytest.raises(TypeError, match=message):
            call(images)


def test_a_folder_is_not_an_image(predictor: ClassificationPredictor, photos: list[Path]) -> None:
    folder = photos[0].parent
    with pytest.raises(DataError, match=r": a folder is not opened here: .*rglob.*`vmamba predict`"):
        predictor(folder)
    with pytest.raises(DataError, match=r"\*\.png: no such image; a pattern is not opened here"):
        predictor(str(folder / "*.png"))
    bracketed = folder / "a[1].png"
    bracketed.write_bytes(photos[0].read_bytes())
    assert predictor(bracketed).classes == predictor(photos[0]).classes
    bracketed.unlink()


def test_images_are_read_as_they_are_needed(predictor: ClassificationPredictor, photos: list[Path]) -> None:
    asked = 0

    def endless() -> Iterator[Path]:
        nonlocal asked
        while True:
            asked += 1
            yield photos[0]

    answers = predictor.stream(endless(), batch_size=2)
    next(answers)
    assert asked == 2
    next(answers)
    assert asked == 2
    next(answers)
    assert asked == 4


def test_tensors_of_several_sizes(predictor: ClassificationPredictor) -> None:
    images = [torch.randn(3, 32, 32), torch.randn(3, 64, 40), torch.randn(3, 32, 32)]
    answers = predictor(images)
    for image, answer in zip(images, answers, strict=True):
        with torch.no_grad():
            expected = predictor.model(image[None]).softmax(1)[0]
        torch.testing.assert_close(torch.tensor(scores(answer)), expected)
    with pytest.raises(ModelError, match="does not take images of 3×1×1"):
        ClassificationPredictor(nn.Conv2d(3, 3, 5), PREPROCESSING, CLASSES)(torch.zeros(3, 1, 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers(value: float, photos: list[Path]) -> None:
    model = small()
    nn.init.constant_(model.head.fc.bias, value)
    predictor = ClassificationPredictor(model, PREPROCESSING, CLASSES)
    with pytest.raises(DataError, match=r"0\.png: the model's outputs are NaN or infinite"):
        predictor(photos[0])
    assert all(isinstance(answer, FailedImage) for answer in predictor(photos))


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "float64"])
def test_other_types(dtype: Any, saved: Path, photos: list[Path]) -> None:
    predictor = vmamba.load(saved, dtype=dtype, device="cpu")
    assert str(predictor.dtype).endswith(str(dtype).removeprefix("torch."))
    expected = probabilities(small(), photos, PREPROCESSING)
    answers = torch.tensor([scores(answer) for answer in predictor(photos)])
    torch.testing.assert_close(answers, expected, rtol=0.1, atol=0.02)


def test_a_folder_for_timm_and_for_us(saved: Path, photos: list[Path]) -> None:
    expected = probabilities(small(), photos, PREPROCESSING)
    theirs = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(theirs)
    assert config["input_size"] == (3, 40, 32) or tuple(config["input_size"]) == (3, 40, 32)
    assert (tuple(config["mean"]), config["crop_pct"]) == (PREPROCESSING.mean, 0.8)
    assert theirs.pretrained_cfg["label_names"] == CLASSES
    transform = timm.data.create_transform(**config)
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in photos])
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch).softmax(1), expected)
    for place in (saved, saved / BEST, saved / "config.json"):
        predictor = vmamba.load(place, device="cpu")
        torch.testing.assert_close(
            torch.tensor([scores(answer) for answer in predictor(photos)]), expected, rtol=0, atol=1e-6
        )
        assert (predictor.classes, predictor.preprocessing) == (CLASSES, PREPROCESSING)
    assert vmamba.load(saved, classes=["a", "b", "c"]).classes == ["a", "b", "c"]
    with pytest.raises(ModelError, match="classes: 2 names for a model of 3 classes"):
        vmamba.load(saved, classes=["a", "b"])


def test_a_model_that_could_not_be_read_again_is_not_described() -> None:
    with pytest.raises(ModelError, match="has other weights than this model; give the arguments"):
        model_config(small(), PREPROCESSING, CLASSES)


def test_a_timm_hub_folder_of_others(tmp_path: Path) -> None:
    """As timm's own export writes it: without our key, with names for the labels."""
    model = timm.create_model("test_vit", num_classes=3).eval()
    config = {
        "label_names": ["n1", "n2", "n3"],
        "label_descriptions": {"n1": "tench", "n2": "crane", "n3": "cock"},
    }
    timm.models.save_for_hf(model, tmp_path, config, safe_serialization=True)
    predictor = vmamba.load(tmp_path, device="cpu")
    assert predictor.classes == ["tench", "crane", "cock"]
    image = torch.randn(3, *predictor.preprocessing.size)
    with torch.no_grad():
        expected = model(image[None]).softmax(1)[0]
    answer = predictor(image)
    torch.testing.assert_close(torch.tensor(scores(answer, predictor.classes)), expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with an average of its weights, and its images."""
    pytest.importorskip("lightning")
    from images import tiny_values
    from vmamba.train import run
    from vmamba.train.recipe import check, override_values
    from vmamba.train.tasks import task_type

    images = make_folder(tmp_path_factory.mktemp("images"))
    out = tmp_path_factory.mktemp("run")
    changes = ["train.ema_decay=0.5", "schedule.epochs=2", "data.mean=[0.4, 0.5, 0.6]", "data.crop_pct=0.7"]
    values = override_values(tiny_values(images), changes)
    run.train(check(task_type("classification").recipe_type, values, "test"), out)
    return out, images


@pytest.mark.parametrize("weights", ["auto", "raw", "ema"])
def test_a_runs_answers_are_evaluations(weights: Any, trained: tuple[Path, Path]) -> None:
    from vmamba.train.evaluation import evaluate

    out, images = trained
    predictor = vmamba.load(out, weights=weights, device="cpu")
    files = sorted((images / "val").rglob("*.png"))
    answers = predictor(files, top=None)
    right = sum(answer.classes[0].label == Path(answer.image).parent.name for answer in answers)
    result = evaluate(out, weights=weights)
    assert result.scores["top1"] == pytest.approx(right / len(files))
    # The expected calibration error depends on every probability.
    confidences = torch.tensor([answer.classes[0].score for answer in answers])
    hits = torch.tensor([answer.classes[0].label == Path(answer.image).parent.name for answer in answers])
    bins = (confidences * 15).ceil().long()
    error = 0.0
    for number in bins.unique():
        inside = bins == number
        gap = confidences[inside].mean() - hits[inside].float().mean()
        error += inside.float().mean().item() * gap.abs().item()
    assert result.scores["calibration_error"] == pytest.approx(error, abs=1e-5)


def test_a_runs_model_carries_the_runs_configuration(trained: tuple[Path, Path]) -> None:
    """README's transform is right on it."""
    out, images = trained
    predictor = vmamba.load(out / "checkpoints" / "last.ckpt", device="cpu")
    config = timm.data.resolve_model_data_config(predictor.model)
    assert (config["input_size"], config["mean"], config["crop_pct"]) == ((3, 32, 32), (0.4, 0.5, 0.6), 0.7)
    assert predictor.model.default_cfg is predictor.model.pretrained_cfg
    path = next((images / "val").rglob("*.png"))
    image = timm.data.create_transform(**config)(Image.open(path).convert("RGB"))
    assert asdict(predictor(image))["classes"] == asdict(predictor(path))["classes"]
    assert predictor.model.pretrained_cfg["label_names"] == CLASSES


def test_another_size_has_no_pool_size_left() -> None:
    model = small()
    set_configuration(model, Preprocessing.of_model(model), CLASSES)
    assert model.pretrained_cfg["pool_size"] == (2, 2)
    set_configuration(model, PREPROCESSING, CLASSES)
    assert "pool_size" not in model.pretrained_cfg


@pytest.fixture
def authors_file(tmp_path: Path) -> Path:
    """1,000 classes under the authors' names, as vmamba_pico has them."""
    torch.manual_seed(0)
    path = tmp_path / "vssm_pico.pth"
    weights = authors_names(timm.create_model("vmamba_pico").state_dict())
    torch.save({"model": weights, "epoch": 3}, path)
    return path


def test_the_authors_file_with_imagenets_names(authors_file: Path, photos: list[Path]) -> None:
    for name in (None, "vmamba_pico"):
        predictor = vmamba.load(authors_file, model=name, device="cpu")
        assert len(predictor.classes) == 1000
        assert (predictor.classes[0], predictor.classes[1]) == (
            "tench, Tinca tinca",
            "goldfish, Carassius auratus",
        )
        assert predictor.preprocessing.size == (32, 32)
    torch.manual_seed(0)
    model = timm.create_model("vmamba_pico").eval()
    expected = probabilities(model, photos, predictor.preprocessing)
    for answer, row in zip(predictor(photos), expected, strict=True):
        assert answer.classes[0].label == predictor.classes[int(row.argmax())]
    with pytest.raises(CheckpointError, match="does not fit VMamba"):
        vmamba.load(authors_file, model="vmamba_nano")
    with pytest.raises(ModelError, match="unknown model 'vmamba_pic'"):
        vmamba.load(authors_file, model="vmamba_pic")


@pytest.mark.parametrize("kind", ["of the authors", "saved", "registered"])
def test_untrained(kind: str, authors_file: Path, saved: Path) -> None:
    """The trained model's architecture, classes and preprocessing, with weights that the seed decides."""
    source: Any = {"of the authors": authors_file, "saved": saved, "registered": "vmamba_pico"}[kind]
    models = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        models.append(vmamba.load(source, device="cpu", trained=False))
    one, same, other = ([p.detach() for p in each.model.parameters()] for each in models)
    assert all(map(torch.equal, one, same))
    assert not all(map(torch.equal, one, other))
    if kind == "registered":
        return
    trained = vmamba.load(source, device="cpu")
    assert (models[0].classes, models[0].preprocessing) == (trained.classes, trained.preprocessing)
    assert not any(map(torch.equal, one[:1], trained.model.parameters()))
    assert [p.shape for p in one] == [p.shape for p in trained.model.parameters()]


def test_weights_of_no_variant(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(small().state_dict(), path)
    with pytest.raises(ModelError, match=r"other\.pth: does not say which model .* name it, with model=…"):
        vmamba.load(path)


def test_a_registered_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(**dict.fromkeys(ARGS), num_classes=1000)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    from vmamba.models import factory

    real = timm.create_model

    def create(name: str, **args: Any) -> Any:
        return real(name, pretrained_cfg_overlay={"file": str(path)}, **args)

    monkeypatch.setattr(factory.timm, "create_model", create)
    predictor = vmamba.load("vmamba_pico", device="cpu")
    assert predictor.classes[1] == "goldfish, Carassius auratus"
    assert torch.equal(predictor.model.head.fc.weight, model.head.fc.weight)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("vmamba_tny", MissingCheckpointError, "vmamba_tny: no such checkpoint; .*did you mean vmamba_tiny"),
        ("none/best.ckpt", MissingCheckpointError, "there is no folder none"),
        ("vmamba_pico.foo", ModelError, "vmamba_pico has 'untrained', not 'foo'"),
        ("vmamba_pico", CheckpointError, "^no pretrained weights of vmamba_pico were released; train"),
    ],
)
def test_sources_that_are_not_there(
    source: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        vmamba.load(source)


def test_bad_devices_types_and_configurations(saved: Path, tmp_path: Path) -> None:
    for device in ("nosuch", "cuda:99"):
        with pytest.raises(ModelError, match=f"device: '{device}' is unknown or not here"):
            vmamba.load(saved, device=device)
    with pytest.raises(ModelError, match=r"dtype: expected one of float32, .*, got 'int8'"):
        vmamba.load(saved, dtype="int8")
    with pytest.raises(ModelError, match=r"model: .* is of vmamba_pico, not of vmamba_tiny"):
        vmamba.load(saved, model="vmamba_tiny")
    copy = tmp_path / BEST
    copy.write_bytes((saved / BEST).read_bytes())
    for text in ("{", "[]", json.dumps({"num_classes": 3})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: "):
            vmamba.load(tmp_path)
    config = json.loads((saved / "config.json").read_text())
    config["vmamba"]["preprocessing"]["std"] = [0, 0, 0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="its configuration is damaged"):
        vmamba.load(tmp_path)


def test_another_tasks_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: list[Path]) -> None:
    """A task in `vmamba.train.tasks` brings its own; reading, batches and errors are the base's."""

    class Brightness(vmamba.Predictor):
        task = "brightness"

        def decode(self, outputs: Any, names: Any, top: Any) -> list[Prediction]:
            return [
                Classification(name, [vmamba.inference.ClassScore("mean", value.mean().item())])
                for name, value in zip(names, outputs["maps"], strict=True)
            ]

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"maps": x * self.scale}

    def load_predictor(
        checkpoint: Any, weights: str, *, model: str | None, trained: bool, device: Any, dtype: Any
    ) -> vmamba.Predictor:
        model = Maps()
        model.load_state_dict(checkpoint.state_dict(weights))
        return Brightness(model, PREPROCESSING, checkpoint.classes, device=device, dtype=dtype)

    tasks = types.ModuleType("vmamba.train.tasks")
    tasks.load_predictor = load_predictor
    monkeypatch.setitem(sys.modules, "vmamba.train.tasks", tasks)
    path = tmp_path / "last.ckpt"
    contents = {"recipe": {"task": "brightness"}, "classes": ["mean"]}
    torch.save(seal({"state_dict": {"model.scale": torch.full((1,), 2.0)}, "vmamba": contents}), path)
    predictor = vmamba.load(path, device="cpu")
    first, broken = predictor([photos[0], tmp_path / "none.png"])
    image = predictor.transform(Image.open(photos[0]).convert("RGB"))
    assert first.classes[0].score == pytest.approx(2 * image.mean().item(), rel=1e-5)
    assert isinstance(broken, FailedImage)


def test_it_needs_nothing_of_training(saved: Path, photos: list[Path]) -> None:
    code = f"""
import sys
absent = ["lightning", "torchmetrics", "matplotlib", "mlxtend", "tensorboard", "pandas"]
sys.modules.update(dict.fromkeys(absent))  # None: an import of it fails
import vmamba
predictor = vmamba.load({str(saved)!r}, device="cpu")
print(predictor({str(photos[0])!r}).classes[0].label)
assert not [name for name in sys.modules if name.startswith("vmamba.train")]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in CLASSES
