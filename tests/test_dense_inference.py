"""Predictors of objects and of classes of pixels, and the checkpoints of mmdet and mmseg."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from pycocotools import mask as coco_masks
from torch import Tensor, nn

import vmamba
from dense_models import detector, mmdet_file, segmenter
from vmamba.data.names import ADE20K_CLASSES, COCO_CATEGORY_IDS, COCO_CLASSES
from vmamba.data.objects import decoded_masks, encoded_masks
from vmamba.data.preprocessing import Preprocessing
from vmamba.dense_inference import (
    Detection,
    DetectionPredictor,
    Segmentation,
    SegmentationPredictor,
    mask_codes,
)
from vmamba.errors import CheckpointError, DataError, ModelError
from vmamba.heads import Features, mask_rcnn, mmdet_names
from vmamba.heads.masks import paste_masks
from vmamba.heads.sliding import SegmentedViews
from vmamba.heads.upernet import mmseg_names
from vmamba.inference import FailedImage
from vmamba.sizes import scaled_size

THINGS = ["cat", "dog", "cow"]
STUFF = ["wall", "sky", "tree", "road", "sea"]
PREPROCESSING = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def detecting() -> DetectionPredictor:
    return DetectionPredictor(detector(), PREPROCESSING, THINGS, category_ids=[3, 7, 9])


@pytest.fixture(scope="module")
def segmenting() -> SegmentationPredictor:
    return SegmentationPredictor(segmenter(), PREPROCESSING, STUFF, base_size=(64, 128))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of the same size and one that its EXIF orientation turns by a quarter."""
    place = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    paths = [place / f"{name}.png" for name in ("a", "b", "turned")]
    for path in paths:
        image = Image.fromarray(random.integers(0, 255, (4, 5, 3), np.uint8)).resize((50, 40))
        exif = Image.Exif()
        exif[0x0112] = 6 if path.stem == "turned" else 1
        image.save(path, exif=exif)
    return paths


def upright(path: Path) -> Tensor:
    """(3, h, w) in 0 … 1."""
    image = Image.open(path)
    if path.stem == "turned":
        image = image.transpose(Image.Transpose.ROTATE_270)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


def decoded(detection: Detection) -> Tensor:
    codes = [dict(each.mask) for each in detection.objects]
    return decoded_masks(codes, detection.size).bool()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_objects_are_the_models(batch_size: int, detecting: DetectionPredictor, photos: list[Path]) -> None:
    detections = detecting(photos, batch_size=batch_size)
    assert [each.size for each in detections] == [(40, 50), (40, 50), (50, 40)]
    for path, detection in zip(photos, detections, strict=True):
        with torch.no_grad():
            (expected,) = detecting.model([upright(path)])
        sure = expected["scores"] >= 0.3
        assert 0 < len(detection.objects) == int(sure.sum())
        boxes = torch.tensor([each.box for each in detection.objects])
        torch.testing.assert_close(boxes, expected["boxes"][sure], atol=1e-3, rtol=0)
        labels = expected["labels"][sure].tolist()
        assert [each.label for each in detection.objects] == [THINGS[label - 1] for label in labels]
        assert [each.category for each in detection.objects] == [[3, 7, 9][label - 1] for label in labels]
        scores = torch.tensor([each.score for each in detection.objects])
        torch.testing.assert_close(scores, expected["scores"][sure])
        masks = decoded(detection)
        differ = masks != (expected["masks"][sure, 0] >= 0.5)
        assert masks.any()
        assert differ.float().mean() < (
            1e-6 if batch_size == 1 else 1e-3
        )  # products of a batch round otherwise


def test_at_most_so_many_and_so_sure(photos: list[Path]) -> None:
    predictor = DetectionPredictor(detector(), PREPROCESSING, THINGS, min_score=0.05)
    everything = predictor(photos[0]).objects
    assert len(everything) == 12
    assert predictor(photos[0], top=2).objects == everything[:2]
    predictor.min_score = everything[4].score
    assert predictor(photos[0]).objects == everything[:5]
    predictor.min_score = 1
    assert predictor(photos[0]).objects == []
    assert predictor(photos[0]).text() == "nothing"
    for wrong in (0.01, 1.5):
        with pytest.raises(ValueError, match=r"min_score: expected 0\.05 \(the model gives no objects"):
            predictor.min_score = wrong


@pytest.mark.parametrize(("threshold", "least"), [(0.05, 0.3), (0.5, 0.5)])
def test_a_high_score_threshold_is_the_least_score(threshold: float, least: float) -> None:
    model = detector(score_threshold=threshold)
    assert DetectionPredictor(model, PREPROCESSING, THINGS).min_score == least


def test_masks_are_pasted_and_encoded_one_by_one(photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = detector(), upright(photos[0])
    with torch.no_grad():
        (whole,) = model([image])
        (within_boxes,) = model([image], paste=False)
    expected = encoded_masks((whole["masks"][:, 0] >= 0.5).byte().numpy())
    pasted = []

    def paste(masks: Tensor, *args: Any) -> Tensor:
        pasted.append(len(masks))
        return paste_masks(masks, *args)

    monkeypatch.setattr("vmamba.dense_inference.paste_masks", paste)
    assert mask_codes(within_boxes["masks"], within_boxes["boxes"], (40, 50)) == expected
    assert pasted == [1] * 12
    assert torch.equal(within_boxes["boxes"], whole["boxes"])
    (half,) = mask_codes(torch.full((1, 1, 1, 1), 0.5), torch.tensor([[0.0, 0, 1, 1]]), (40, 50))
    assert coco_masks.area(half) == 1  # 0.5 belongs to the object


def test_what_is_said_and_written_of_objects(detecting: DetectionPredictor, photos: list[Path]) -> None:
    detection = detecting(photos[0])
    values = json.loads(json.dumps(asdict(detection)))
    assert list(values) == ["image", "size", "objects"]
    assert list(values["objects"][0]) == ["label", "category", "score", "box", "mask"]
    mask = values["objects"][0]["mask"]
    assert mask["size"] == [40, 50]
    assert decoded_masks([mask], (40, 50)).shape == (1, 40, 50)
    one, *_ = detection.objects
    scores = [("dog", 0.987), ("cat", 0.912), ("dog", 0.87), ("cow", 0.8), ("dog", 0.5), ("dog", 0.4)]
    objects = [type(one)(label, 1, score, one.box, one.mask) for label, score in scores]
    assert Detection(None, (1, 1), objects[:3]).text() == "2 dog (99%, 87%), cat (91%)"
    assert Detection(None, (1, 1), objects).text() == "4 dog (99%, 87%, 50%, …), cat (91%), cow (80%)"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_classes_of_pixels_are_the_models(
    batch_size: int, segmenting: SegmentationPredictor, photos: list[Path]
) -> None:
    answers = segmenting(photos, batch_size=batch_size)
    mean, std = (
        torch.tensor(PREPROCESSING.mean)[:, None, None],
        torch.tensor(PREPROCESSING.std)[:, None, None],
    )
    for path, answer in zip(photos, answers, strict=True):
        image = upright(path)
        size = scaled_size(tuple(image.shape[1:]), 64, 128)
        assert min(size) == 64
        resized = nn.functional.interpolate(image[None], size, mode="bilinear", align_corners=False)
        with torch.no_grad():
            logits = segmenting.model((resized - mean) / std)
        expected = nn.functional.interpolate(logits, image.shape[1:], mode="bilinear", align_corners=False)
        labels = expected.argmax(1)[0]
        assert answer.labels.dtype == np.uint8
        assert (torch.from_numpy(answer.labels) == labels).float().mean() > 0.999
        assert answer.size == answer.labels.shape == image.shape[1:]
        shares = {each.label: each.share for each in answer.classes}
        counts = np.bincount(answer.labels.ravel(), minlength=5) / answer.labels.size
        assert shares == {STUFF[n]: counts[n] for n in range(5) if counts[n]}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_what_is_said_and_written_of_pixels(segmenting: SegmentationPredictor, photos: list[Path]) -> None:
    answer = segmenting(photos[0])
    values = json.loads(json.dumps(asdict(answer)))
    assert list(values) == ["image", "size", "classes"]
    assert list(values["classes"][0]) == ["label", "number", "share"]
    assert answer.text().startswith(f"{answer.classes[0].label} {answer.classes[0].share:.1%}")
    many = [type(answer.classes[0])(str(n), n, 0.125) for n in range(8)]
    text = Segmentation(None, answer.labels, many).text()
    assert text == "0 12.5%, 1 12.5%, 2 12.5%, 3 12.5%, 4 12.5%, 3 more"
    assert len(segmenting(photos[0], top=1).classes) == 1


def test_windows(segmenting: SegmentationPredictor, photos: list[Path]) -> None:
    model = segmenting.model
    settings: dict[str, Any] = {"base_size": (64, 128)}
    whole = SegmentationPredictor(model, PREPROCESSING, STUFF, window=128, **settings)
    assert whole.views.stride == 85
    assert np.array_equal(whole(photos[0]).labels, segmenting(photos[0]).labels)
    windows = SegmentationPredictor(model, PREPROCESSING, STUFF, window=48, stride=16, **settings)
    assert not np.array_equal(windows(photos[0]).labels, segmenting(photos[0]).labels)
    evaluated = SegmentedViews(model, 64, 128, window=48, stride=16)
    labels = evaluated.labels(windows.transform(Image.open(photos[0]))[None])[0]
    assert np.array_equal(windows(photos[0]).labels, labels.numpy())
    with pytest.raises(ValueError, match="stride: expected from 1 to the window's 48, got 50"):
        SegmentationPredictor(model, PREPROCESSING, STUFF, window=48, stride=50, **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype, photos: list[Path]) -> None:
    detecting = DetectionPredictor(detector(), PREPROCESSING, THINGS, dtype=dtype)
    exact = DetectionPredictor(detector(), PREPROCESSING, THINGS)(photos[0]).objects[0]
    best = detecting(photos[0]).objects[0]
    assert detecting.dtype == dtype
    assert best.score == pytest.approx(exact.score, abs=0.05)
    segmenting = SegmentationPredictor(segmenter(), PREPROCESSING, STUFF, base_size=(64, 128), dtype=dtype)
    labels = segmenting(photos[0]).labels
    expected = SegmentationPredictor(segmenter(), PREPROCESSING, STUFF, base_size=(64, 128))(photos[0]).labels
    assert (labels == expected).mean() > 0.9


def test_images_that_fail(
    detecting: DetectionPredictor, segmenting: SegmentationPredictor, photos: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photos[0].read_bytes()[:60])
    for predictor in (detecting, segmenting):
        first, second = predictor([broken, photos[0]])
        assert isinstance(first, FailedImage)
        assert "broken.png: not an image" in first.error
        assert asdict(second) == asdict(predictor(photos[0]))
        with pytest.raises(DataError, match=r"broken\.png: not an image"):
            predictor(broken)


@pytest.mark.parametrize(
    "layer", ["backbone.body.model.stem.conv1", "rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score"]
)
def test_nan_is_no_empty_image(layer: str, photos: list[Path]) -> None:
    model = detector()
    model.get_submodule(layer).weight.data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"a\.png: the model's outputs are NaN or infinite"):
        DetectionPredictor(model, PREPROCESSING, THINGS)(photos[0])


def test_nan_in_classes_of_pixels(photos: list[Path]) -> None:
    model = segmenter()
    model.decode_head.conv_seg.bias.data[1] = float("nan")
    with pytest.raises(DataError, match=r"a\.png: the model's outputs are NaN or infinite"):
        SegmentationPredictor(model, PREPROCESSING, STUFF)(photos[0])


def test_one_of_a_batch_has_nan(segmenting: SegmentationPredictor) -> None:
    good = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(0))
    broken = good.clone()
    broken[0, 0, 0] = torch.nan
    first, second = segmenting([broken, good], batch_size=2)
    assert isinstance(first, FailedImage)
    assert isinstance(second, Segmentation)


def test_every_kind_of_image(
    detecting: DetectionPredictor, segmenting: SegmentationPredictor, photos: list[Path]
) -> None:
    image = Image.open(photos[0])
    array = np.asarray(image)
    chw = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for predictor, floats in ((detecting, chw / 255), (segmenting, segmenting.transform(image))):
        expected = asdict(predictor(photos[0]))
        for form in (image, array, chw):
            assert asdict(predictor(form)) == {**expected, "image": None}
        assert asdict(predictor(floats)) == {**expected, "image": None}
    assert detecting(chw / 255) == detecting(image)
    gray = detecting(image.convert("L"))
    assert gray.size == (40, 50)


def test_wrong_names_and_ids() -> None:
    with pytest.raises(ModelError, match="classes: 2 names for a model of 3 classes"):
        DetectionPredictor(detector(), PREPROCESSING, THINGS[:2])
    with pytest.raises(ModelError, match="category_ids: 1 id for 3 classes"):
        DetectionPredictor(detector(), PREPROCESSING, THINGS, category_ids=[1])
    with pytest.raises(ModelError, match="classes: 5 names for a model of 6 classes"):
        SegmentationPredictor(segmenter(6), PREPROCESSING, STUFF)


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("number", "names"), [(80, list(COCO_CLASSES)), (2, ["0", "1"])])
def test_detectors_of_mmdet(number: int, names: list[str], photos: list[Path], tmp_path: Path) -> None:
    model = detector("test_convnext2", number + 1)
    path = mmdet_file(tmp_path / "epoch_12.pth", model, mmdet_names)
    predictor: Any = vmamba.load(path, model="test_convnext2", device="cpu")
    assert (predictor.task, predictor.classes) == ("detection", names)
    assert predictor.category_ids == (list(COCO_CATEGORY_IDS) if number == 80 else [1, 2])
    assert same(predictor.model, model)
    assert predictor.model.config.score_threshold == 0.05
    assert isinstance(predictor(photos[0]), Detection)
    named = vmamba.load(path, model="test_convnext2", device="cpu", classes=[f"c{n}" for n in range(number)])
    assert named.classes[1] == "c1"
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, path)
    assert same(vmamba.load(path, model="test_convnext2", device="cpu", dtype="float32").model, model)


@pytest.mark.parametrize(("number", "names"), [(150, list(ADE20K_CLASSES)), (2, ["0", "1"])])
@pytest.mark.parametrize("norm", [True, False])
def test_segmenters_of_mmseg(
    norm: bool, number: int, names: list[str], photos: list[Path], tmp_path: Path
) -> None:
    model = segmenter(number, "test_convnext2", norm=norm)
    path = mmdet_file(tmp_path / "iter_160000.pth", model, mmseg_names)
    predictor: Any = vmamba.load(path, model="test_convnext2", device="cpu")
    assert (predictor.task, predictor.classes) == ("segmentation", names)
    assert same(predictor.model, model)
    untrained = vmamba.load(path, model="test_convnext2", device="cpu", trained=False).model
    assert not same(untrained, model)
    assert untrained.state_dict().keys() == model.state_dict().keys()
    assert predictor.preprocessing.mean == (0.485, 0.456, 0.406)
    assert isinstance(predictor(photos[0]), Segmentation)


def test_the_backbone_is_told_by_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, **args: Any) -> Any:
        sizes = {"vmamba_tiny": (8, 16, 32, 64), "vmamba_small": (8, 16, 32, 48)}
        return timm.create_model(name, **{**args, "depths": (1, 1, 1, 1), "dims": sizes[name]})

    path = mmdet_file(tmp_path / "epoch_12.pth", segmenter(), mmseg_names)
    with pytest.raises(ModelError, match=r"epoch_12\.pth: does not say which backbone it has, .* model=…"):
        vmamba.load(path, device="cpu")
    restoring = "vmamba.heads.restoring"
    monkeypatch.setattr(f"{restoring}.model_names", lambda: ["vmamba_small", "vmamba_tiny"])
    monkeypatch.setattr(f"{restoring}.create_on_meta", create)
    made = []

    def features(name: str, norm: bool) -> Features:
        made.append(name)
        return Features(create(name, num_classes=0), norm=norm)

    monkeypatch.setattr(f"{restoring}.Features.create", features)
    assert vmamba.load(path, device="cpu").task == "segmentation"
    assert made == ["vmamba_tiny"]


def test_other_detectors_are_refused(tmp_path: Path) -> None:
    model = mask_rcnn(Features.create("test_convnext2"), 3, channels=8, hidden=16)
    weights = mmdet_names(model.state_dict())
    cascade = {name.replace("bbox_head.", "bbox_head.0."): value for name, value in weights.items()}
    path = tmp_path / "cascade.pth"
    torch.save({"state_dict": cascade}, path)
    with pytest.raises(CheckpointError, match=r"cascade\.pth: not the weights of mmdet's Mask R-CNN"):
        vmamba.load(path, model="test_convnext2")
    boxes = {name: value for name, value in weights.items() if "mask_head" not in name}
    torch.save({"state_dict": boxes}, path)
    with pytest.raises(CheckpointError, match=r"missing: roi_heads\.mask_head"):
        vmamba.load(path, model="test_convnext2")
