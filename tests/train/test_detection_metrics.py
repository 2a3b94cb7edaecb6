"""Average precision, the matching of detections and objects, and what an evaluation of a detector writes."""

import contextlib
import csv
import io
import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vmamba.errors import DataError

pytest.importorskip("pycocotools", reason="pycocotools is not installed")

from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vmamba.data.objects import Objects, encoded_masks
from vmamba.data.sources.coco import CocoImages
from vmamba.train import detection_metrics
from vmamba.train.detection_matches import confusion_of, match, regions_of_detections, regions_of_objects
from vmamba.train.detection_metrics import KINDS, SCORES, CocoMetric
from vmamba.train.detection_reports import (
    draw_worst_detections,
    judge_detections,
    write_detection_report,
)
from vmamba.train.guard import NonFiniteError
from vmamba.train.task import SamplePrediction
from vmamba.train.task import scores as task_scores

CLASSES = ["cat", "dog", "owl"]
Detections = dict[str, Any]


def boxes_to_masks(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Ellipses in boxes, (n, h, w) bool."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    left, top, right, bottom = (edge[:, None, None] for edge in boxes.unbind(1))
    across = (2 * x - left - right) / (right - left)
    down = (2 * y - top - bottom) / (bottom - top)
    return across**2 + down**2 < 1


def random_boxes(number: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Boxes (n, 4) of small to large extent, inside the image."""
    height, width = size
    limits = torch.tensor([width, height])
    extent = 4 + torch.rand(number, 2, generator=generator) ** 2 * (limits - 8)
    corner = torch.rand(number, 2, generator=generator) * (limits - extent)
    return torch.cat([corner, corner + extent], dim=1)


def make_objects(
    image_id: int, boxes: Tensor, labels: list[int], crowd: list[bool], size: tuple[int, int]
) -> Objects:
    masks = encoded_masks(boxes_to_masks(boxes, size).byte().numpy())
    areas = torch.tensor([float(coco_masks.area(mask)) for mask in masks])
    return Objects(
        image_id,
        size,
        boxes.float(),
        torch.tensor(labels, dtype=torch.int64),
        masks,
        areas,
        torch.tensor(crowd, dtype=torch.bool),
        list(range(len(labels))),
    )


def make_detections(
    boxes: Tensor, labels: list[int], scores: list[float], size: tuple[int, int]
) -> Detections:
    return {
        "boxes": boxes.float(),
        "labels": torch.tensor(labels, dtype=torch.int64) + 1,
        "scores": torch.tensor(scores),
        "masks": encoded_masks(boxes_to_masks(boxes, size).byte().numpy()),
    }


def scene(image_id: int, generator: torch.Generator) -> tuple[Detections, Objects]:
    """Objects, some of them crowds, and detections of most of them, with errors."""
    size = (110 + image_id, 150)
    number = int(torch.randint(0, 9, (), generator=generator))
    boxes = random_boxes(number, size, generator)
    labels = torch.randint(0, 3, (number,), generator=generator).tolist()
    crowd = (torch.rand(number, generator=generator) < 0.15).tolist()
    objects = make_objects(image_id, boxes, labels, crowd, size)
    seen = torch.rand(number, generator=generator) < 0.8
    extent = (boxes[seen, 2:] - boxes[seen, :2]).repeat(1, 2)
    shifted = boxes[seen] + 0.07 * extent * torch.randn(len(extent), 4, generator=generator)
    more = int(torch.randint(0, 3, (), generator=generator))
    detected = torch.cat([shifted, random_boxes(more, size, generator)])
    detected_labels = [label for label, is_seen in zip(labels, seen.tolist(), strict=True) if is_seen] + [
        1
    ] * more
    scores = (torch.rand(len(detected), generator=generator) * 20).round() / 20  # some are equal
    return make_detections(detected, detected_labels, scores.tolist(), size), objects


def scenes(number: int = 30) -> list[tuple[Detections, Objects]]:
    generator = torch.Generator().manual_seed(3)
    return [scene(image_id, generator) for image_id in range(number)]


def coco_scores(images: list[tuple[Detections, Objects]], folder: Path) -> dict[str, float]:
    """By pycocotools alone, from files as its users write them."""
    annotations, results = [], {"box": [], "mask": []}
    for detections, objects in images:
        for number, (left, top, right, bottom) in enumerate(objects.boxes.tolist()):
            mask = objects.masks[number]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": objects.image_id,
                    "category_id": 10 * objects.labels[number].item() + 7,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": objects.areas[number].item(),
                    "iscrowd": int(objects.crowd[number]),
                    "segmentation": {**mask, "counts": mask["counts"].decode()},
                }
            )
        for number, (left, top, right, bottom) in enumerate(detections["boxes"].tolist()):
            shared = {
                "image_id": objects.image_id,
                "category_id": 10 * (detections["labels"][number].item() - 1) + 7,
                "score": detections["scores"][number].item(),
            }
            results["box"].append({**shared, "bbox": [left, top, right - left, bottom - top]})
            mask = detections["masks"][number]
            results["mask"].append({**shared, "segmentation": {**mask, "counts": mask["counts"].decode()}})
    truth = {
        "images": [
            {"id": o.image_id, "file_name": f"{o.image_id}.png", "height": o.size[0], "width": o.size[1]}
            for _, o in images
        ],
        "categories": [{"id": 10 * number + 7, "name": name} for number, name in enumerate(CLASSES)],
        "annotations": annotations,
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    scores = {}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "truth.json"))
        for kind, type_name in (("box", "bbox"), ("mask", "segm")):
            (folder / f"{kind}.json").write_text(json.dumps(results[kind]))
            evaluation = COCOeval(coco, coco.loadRes(str(folder / f"{kind}.json")), type_name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            values = [*evaluation.stats[:6], evaluation.stats[8]]
            scores |= {f"{kind}_{name}": value for name, value in zip(SCORES, values, strict=True)}
    return scores


@pytest.fixture(params=["pycocotools", "faster_coco_eval"])
def evaluator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each package that can compute the scores."""
    if request.param == "pycocotools":
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
        assert detection_metrics._evaluator()[1] is COCOeval
    elif find_spec("faster_coco_eval") is None:
        pytest.skip("faster-coco-eval is not installed")
    return request.param


def test_scores_are_those_of_pycocotools_from_files(
    evaluator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = scenes()
    metric = CocoMetric(CLASSES)
    for start in range(0, len(images), 3):
        detections, objects = zip(*images[start : start + 3], strict=True)
        metric.update(detections, objects)
    results = metric.compute()
    expected = coco_scores(images, tmp_path)
    assert capsys.readouterr().out == ""
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert 0.05 < value < 0.95, "the scenes are too easy or too hard to tell"
        assert results[name].item() == pytest.approx(value, abs=1e-12), name
    metric.reset()
    with pytest.raises(DataError, match="not one of the 0 evaluated images has an object"):
        metric.compute()


def test_boxes_over_the_border_count_as_the_file_has_them(tmp_path: Path) -> None:
    images = []
    for detections, objects in scenes():
        extent = objects.boxes[:, 2:] - objects.boxes[:, :2]
        grown = objects.boxes + 0.3 * torch.cat([-extent, extent], dim=1)
        images.append((detections, replace(objects, boxes=grown)))
    expected = coco_scores(images, tmp_path)
    source = CocoImages(tmp_path, tmp_path / "truth.json")
    as_annotated, clipped = CocoMetric(CLASSES), CocoMetric(CLASSES)
    for index, (detections, _) in enumerate(images):
        objects = source.target(index)
        as_annotated.update([detections], [objects])
        height, width = objects.size
        boxes = objects.boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        clipped.update([detections], [replace(objects, boxes=boxes)])
    for name, value in as_annotated.compute().items():
        assert value.item() == pytest.approx(expected[name], abs=1e-12), name
    assert abs(clipped.compute()["box_AP50"].item() - expected["box_AP50"]) > 0.01


def test_tables_agree_with_scores_and_confusion(evaluator: str) -> None:
    images = scenes()
    metric = CocoMetric(["cat", "dog", "owl", "unseen"], tables=True)
    for detections, objects in images:
        metric.update([detections], [objects])
    results = metric.compute()
    for kind in KINDS:
        table = results[f"{kind}_per_class"]
        assert table.shape == (4, 7)
        assert table[3].isnan().all()
        for column, name in enumerate(SCORES):
            assert table[:3, column].nanmean().item() == pytest.approx(
                results[f"{kind}_{name}"].item(), abs=1e-12
            )
        precision = results[f"{kind}_precision"]
        assert precision.shape == (10, 101, 4)
        assert torch.allclose(precision.mean((0, 1))[:3], table[:3, 0])
        assert torch.allclose(precision[5].mean(0)[:3], table[:3, 2])
    objects_per_class = torch.bincount(torch.cat([o.labels[~o.crowd] for _, o in images]), minlength=4)
    assert torch.equal(results["confusion"].sum(1)[:4], objects_per_class)


def test_absent_sizes_are_left_out_and_images_without_detections_count(evaluator: str) -> None:
    size = (60, 60)
    box = torch.tensor([[10.0, 10, 40, 40]])
    metric = CocoMetric(["cat"], tables=True)
    metric.update([make_detections(box, [0], [0.9], size)], [make_objects(1, box, [0], [False], size)])
    results = metric.compute()
    assert results["box_AP"].item() == results["box_AP_small"].item() == pytest.approx(1)
    names = {"AP", "AP50", "AP75", "AP_small", "AR100"}  # there is nothing larger
    assert set(task_scores(results)) == {f"{kind}_{name}" for kind in KINDS for name in names}
    nothing = make_detections(box[:0], [], [], size)
    metric.update([nothing], [make_objects(2, box, [0], [False], size)])
    assert metric.compute()["box_AR100"] == 0.5
    metric.update([make_detections(box, [0], [0.95], size)], [make_objects(3, box[:0], [], [], size)])
    assert metric.compute()["box_AP50"] == pytest.approx(51 / 101 * 0.5)


def test_an_image_that_comes_twice_counts_once() -> None:
    detections, objects = max(scenes(6), key=lambda pair: len(pair[1]))
    once, twice = CocoMetric(CLASSES, tables=True), CocoMetric(CLASSES, tables=True)
    once.update([detections], [objects])
    for _ in range(2):
        twice.update([detections], [objects])
    for name, value in once.compute().items():
        assert torch.equal(value.nan_to_num(-1), twice.compute()[name].nan_to_num(-1)), name


def test_images_of_all_processes_are_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    images = scenes(12)
    whole, first, second = (CocoMetric(CLASSES, tables=True) for _ in range(3))
    for number, (detections, objects) in enumerate(images):
        whole.update([detections], [objects])
        (first, second)[number % 2].update([detections], [objects])
    expected = whole.compute()
    monkeypatch.setattr(detection_metrics, "gather", lambda mine: [mine, first._images])
    for name, value in second.compute().items():
        assert torch.equal(value.nan_to_num(-1), expected[name].nan_to_num(-1)), name


def test_only_crowd_regions_are_an_error() -> None:
    box, size = torch.tensor([[1.0, 2, 30, 20]]), (40, 40)
    metric = CocoMetric(["cat"])
    metric.update([make_detections(box, [0], [0.9], size)], [make_objects(1, box, [0], [True], size)])
    with pytest.raises(DataError, match="not one of the 1 evaluated images has an object that is no crowd"):
        metric.compute()


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("scores", torch.tensor([float("nan")]), NonFiniteError, "not finite"),
        ("boxes", torch.tensor([[0.0, 0, float("inf"), 9]]), NonFiniteError, "not finite"),
        ("labels", torch.tensor([4]), ValueError, r"expected 1 to 3, got \[4\]"),
        ("labels", torch.tensor([0]), ValueError, r"expected 1 to 3, got \[0\]"),
        ("masks", [], ValueError, r"expected 1 of the image's size \(40, 40\), got \[\]"),
        ("masks", encoded_masks(np.zeros((1, 9, 9), np.uint8)), ValueError, r"\(40, 40\), got \[\(9, 9\)\]"),
    ],
)
def test_detections_that_do_not_fit(name: str, value: Any, error: type[Exception], message: str) -> None:
    box, size = torch.tensor([[1.0, 2, 30, 20]]), (40, 40)
    detections = {**make_detections(box, [0], [0.9], size), name: value}
    with pytest.raises(error, match=message):
        CocoMetric(CLASSES).update([detections], [make_objects(1, box, [0], [False], size)])


def matched(
    boxes: list[list[float]],
    labels: list[int],
    scores: list[float],
    objects: tuple[list[list[float]], list[int], list[bool]],
) -> Tensor:
    size = (100, 100)
    truth = make_objects(1, torch.tensor(objects[0]).reshape(-1, 4), objects[1], objects[2], size)
    detections = make_detections(torch.tensor(boxes).reshape(-1, 4), labels, scores, size)
    pair = (regions_of_detections(detections, size, 2), regions_of_objects(truth))
    return confusion_of([pair], 2)


LEFT, RIGHT = [0.0, 0, 40, 40], [50.0, 0, 90, 40]


@pytest.mark.parametrize(
    ("detections", "objects", "expected"),
    [
        (([LEFT], [0], [0.9]), ([LEFT], [0], [False]), {(0, 0): 1}),
        (([LEFT], [0], [0.29]), ([LEFT], [0], [False]), {(0, 2): 1}),  # the score is too low
        (([RIGHT], [0], [0.9]), ([LEFT], [0], [False]), {(0, 2): 1, (2, 0): 1}),
        (([LEFT], [1], [0.9]), ([LEFT], [0], [False]), {(0, 1): 1}),
        # The right class has precedence over a higher score.
        (([LEFT, LEFT], [1, 0], [0.9, 0.5]), ([LEFT], [0], [False]), {(0, 0): 1, (2, 1): 1}),
        (([LEFT, LEFT], [0, 0], [0.9, 0.5]), ([LEFT], [0], [False]), {(0, 0): 1, (2, 0): 1}),
        # A detection in a crowd region of its class is neither right nor wrong.
        (([[0.0, 0, 9, 9], RIGHT], [0, 1], [0.9, 0.9]), ([LEFT], [0], [True]), {(2, 1): 1}),
        (([[0.0, 0, 9, 9]], [1], [0.9]), ([LEFT], [0], [True]), {(2, 1): 1}),
        (([], [], []), ([LEFT, RIGHT], [0, 1], [False, False]), {(0, 2): 1, (1, 2): 1}),
        (([LEFT], [0], [0.9]), ([], [], []), {(2, 0): 1}),
    ],
)
def test_confusion(detections: tuple, objects: tuple, expected: dict[tuple[int, int], int]) -> None:
    counts = matched(*detections, objects)
    assert {tuple(place): counts[tuple(place)].item() for place in counts.nonzero().tolist()} == expected


def test_f1_of_an_image() -> None:
    size = (100, 100)
    objects = make_objects(1, torch.tensor([LEFT, RIGHT]), [0, 1], [False, False], size)
    nothing = make_objects(1, torch.zeros(0, 4), [], [], size)
    both = make_detections(torch.tensor([LEFT, RIGHT]), [0, 0], [0.9, 0.8], size)
    low = make_detections(torch.tensor([LEFT]), [0], [0.1], size)
    judged = judge_detections(both, objects, 2)
    assert (judged.right, judged.wrong, judged.f1) == (1, 2, 0.5)
    assert judged.labels.tolist() == [0, 0]
    assert torch.equal(judged.boxes, torch.tensor([LEFT, RIGHT]).double())
    assert judge_detections(low, objects, 2).f1 == 0
    assert len(judge_detections(low, objects, 2).boxes) == 0
    assert judge_detections(low, nothing, 2).f1 == 1
    assert judge_detections(both, nothing, 2).f1 == 0


def test_a_match_needs_half_of_the_box() -> None:
    size = (100, 100)
    objects = regions_of_objects(make_objects(1, torch.tensor([[0.0, 0, 40, 40]]), [0], [False], size))
    for width, number in ((20, 1), (19, 0)):
        box = torch.tensor([[0.0, 0, width, 40]])
        detections = regions_of_detections(make_detections(box, [0], [0.9], size), size, 2)
        assert len(match(detections, objects).pairs) == number


def report(folder: Path, classes: list[str]) -> list[SamplePrediction]:
    metric = CocoMetric(classes, tables=True)
    predictions = []
    for number, (detections, objects) in enumerate(scenes(12)):
        metric.update([detections], [objects])
        judged = judge_detections(detections, objects, len(classes))
        predictions.append(SamplePrediction(number, f"{number}.jpg", judged))
    write_detection_report(metric.compute(), classes, folder)
    return predictions


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report(tmp_path, [*CLASSES, "狐 $x$"])
    ap = rows(tmp_path / "ap.csv")
    assert [row["class"] for row in ap] == ["all classes", *CLASSES, "狐 $x$"]
    assert int(ap[0]["objects"]) == sum(int(row["objects"]) for row in ap[1:]) > 0
    assert 0 < float(ap[0]["box_AP"]) < float(ap[0]["box_AP50"]) < 1
    assert ap[4]["box_AP"] == ap[4]["mask_AR100"] == ""
    curves = rows(tmp_path / "precision_recall.csv")
    assert len(curves) == 2 * 3 * 101
    first = [row for row in curves if (row["kind"], row["IoU"]) == ("mask", "0.50:0.95")]
    assert sum(float(row["dog"]) for row in first) / 101 == pytest.approx(float(ap[2]["mask_AP"]), abs=1e-5)
    assert sum(float(row["all classes"]) for row in first) / 101 == pytest.approx(
        float(ap[0]["mask_AP"]), abs=1e-5
    )
    confusion = rows(tmp_path / "confusion.csv")
    assert [row["true class"] for row in confusion] == [*CLASSES, "狐 $x$", "background"]
    for name in ("precision_recall.png", "confusion.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 400


def test_report_of_many_classes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report(tmp_path, [*CLASSES, *(f"class {number}" for number in range(40))])
    assert (tmp_path / "precision_recall.png").exists()


def test_worst_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = scenes(12)
    predictions = [
        SamplePrediction(number, f"{number}.jpg", judge_detections(detections, objects, 3))
        for number, (detections, objects) in enumerate(images)
    ]
    read: list[int] = []

    def load(index: int) -> tuple[Image.Image, Objects]:
        read.append(index)
        if len(read) == 2:
            raise DataError("gone")
        height, width = images[index][1].size
        return Image.new("RGB", (width, height), (90, 120, 90)), images[index][1]

    path = tmp_path / "worst.png"
    draw_worst_detections(predictions, CLASSES, load, path)
    f1 = [predictions[index].value.f1 for index in read]
    assert f1 == sorted(f1)
    assert set(read) == {each.index for each in predictions if each.value.wrong}
    with Image.open(path) as sheet:
        assert sheet.width > 1900
    draw_worst_detections([], CLASSES, load, path)
    assert not path.exists()
