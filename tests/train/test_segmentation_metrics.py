"""Intersection over union against a direct count, and what an evaluation of a segmenter writes."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vmamba.errors import DataError
from vmamba.train import segmentation_metrics
from vmamba.train.segmentation_metrics import IoUMetric
from vmamba.train.segmentation_reports import (
    draw_worst_segmentations,
    judge_segmentation,
    write_segmentation_report,
)
from vmamba.train.task import SamplePrediction
from vmamba.train.task import scores as task_scores

CLASSES = ["sky", "sea", "sand", "boat", "unseen"]


def scenes(number: int = 6, classes: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Predicted and true classes of images of several sizes; some true pixels do not count."""
    generator = torch.Generator().manual_seed(5)
    images = []
    for index in range(number):
        size = (9 + index, 14)
        labels = torch.randint(0, classes, size, generator=generator, dtype=torch.uint8)
        predicted = torch.where(torch.rand(size, generator=generator) < 0.7, labels, 1)
        labels[torch.rand(size, generator=generator) < 0.1] = 255
        images.append((predicted.long(), labels))
    return images


def direct(images: list[tuple[Tensor, Tensor]], classes: int) -> dict[str, float]:
    """mIoU, aAcc and mAcc, counted pixel by pixel."""
    pairs = [
        pair
        for predicted, labels in images
        for pair in zip(predicted.flatten().tolist(), labels.flatten().tolist(), strict=True)
        if pair[1] != 255
    ]
    ious, accuracies = [], []
    for number in range(classes):
        both = sum(p == number and t == number for p, t in pairs)
        either = sum(p == number or t == number for p, t in pairs)
        true = sum(t == number for _, t in pairs)
        ious += [both / either] if either else []
        accuracies += [both / true] if true else []
    right = sum(p == t for p, t in pairs) / len(pairs)
    return {"mIoU": sum(ious) / len(ious), "aAcc": right, "mAcc": sum(accuracies) / len(accuracies)}


def filled(images: list[tuple[Tensor, Tensor]], classes: list[str], tables: bool = False) -> IoUMetric:
    metric = IoUMetric(classes, tables)
    for predicted, labels in images:
        metric.update(predicted, labels)
    return metric


def test_scores_equal_a_direct_count() -> None:
    images = scenes()
    results = filled(images, CLASSES).compute()
    expected = direct(images, len(CLASSES))
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert results[name].item() == pytest.approx(value, abs=1e-12), name


def test_a_class_that_is_predicted_but_nowhere_true_counts_in_iou() -> None:
    labels, predicted = torch.tensor([[0, 0, 0, 255]]), torch.tensor([[0, 0, 1, 2]])
    results = filled([(predicted, labels)], ["a", "b", "c"], tables=True).compute()
    assert results["mIoU"].item() == pytest.approx((2 / 3 + 0) / 2)
    assert results["mAcc"].item() == pytest.approx(2 / 3)
    assert results["per_class"][:, 0].nan_to_num(-1).tolist() == pytest.approx([2 / 3, 0, -1])
    assert results["confusion"].tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_tables_of_one_class_are_no_scores() -> None:
    results = filled([(torch.zeros(3, 4).long(), torch.zeros(3, 4).byte())], ["all"], tables=True).compute()
    assert task_scores(results) == {"mIoU": 1, "aAcc": 1, "mAcc": 1}


def test_pixels_of_all_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    images = scenes()
    expected = filled(images, CLASSES, tables=True).compute()
    first, second = filled(images[::2], CLASSES, tables=True), filled(images[1::2], CLASSES, tables=True)
    monkeypatch.setattr(segmentation_metrics, "gather", lambda mine: [mine, first._confusion, None])
    for name, value in second.compute().items():
        assert torch.equal(value.nan_to_num(-1), expected[name].nan_to_num(-1)), name


def test_without_labelled_pixels() -> None:
    metric = IoUMetric(CLASSES)
    for _ in range(2):
        with pytest.raises(DataError, match="have no labelled pixel"):
            metric.compute()
        metric.update(torch.zeros(3, 3).long(), torch.full((3, 3), 255))
    metric.update(torch.zeros(3, 3).long(), torch.zeros(3, 3).byte())
    assert metric.compute()["mIoU"] == 1
    metric.reset()
    with pytest.raises(DataError, match="have no labelled pixel"):
        metric.compute()


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        (
            torch.zeros(3, 4).long(),
            torch.zeros(4, 3).long(),
            r"expected the labels' size \(4, 3\), got \(3, 4\)",
        ),
        (torch.zeros(3, 4).long(), torch.full((3, 4), 5), "labels: expected classes of 0 to 4, got 5 to 5"),
        (torch.full((3, 4), 255), torch.zeros(3, 4).long(), "predicted: expected classes of 0 to 4, got 255"),
        (torch.zeros(3, 4).long(), torch.full((3, 4), -1), "labels: expected classes of 0 to 4, got -1"),
    ],
)
def test_maps_that_do_not_fit(predicted: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IoUMetric(CLASSES).update(predicted, labels)


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("classes", [CLASSES, ["狐 $x$"]])
def test_report(tmp_path: Path, classes: list[str]) -> None:
    pytest.importorskip("matplotlib")
    images = scenes() if len(classes) > 1 else [(torch.zeros(3, 4).long(), torch.zeros(3, 4).byte())]
    results = filled(images, classes, tables=True).compute()
    write_segmentation_report(results, classes, tmp_path)
    iou = rows(tmp_path / "iou.csv")
    assert [row["class"] for row in iou] == ["all classes", *classes]
    assert float(iou[0]["IoU"]) == pytest.approx(results["mIoU"].item(), abs=1e-6)
    assert float(iou[0]["accuracy"]) == pytest.approx(results["mAcc"].item(), abs=1e-6)
    assert int(iou[0]["pixels"]) == sum(int((labels != 255).sum()) for _, labels in images)
    if len(classes) > 1:
        assert iou[-1]["IoU"] == iou[-1]["accuracy"] == ""
    assert [row["true class"] for row in rows(tmp_path / "confusion.csv")] == classes
    with Image.open(tmp_path / "confusion.png") as image:
        assert min(image.size) > 400


def test_worst_images(tmp_path: Path) -> None:
    images = scenes(5)
    images.append((torch.zeros(8, 8).long(), torch.zeros(8, 8).byte()))  # without a mistake
    images.append((torch.zeros(8, 8).long(), torch.full((8, 8), 255).byte()))  # without a score
    predictions = [
        SamplePrediction(number, f"{number}.png", judge_segmentation(predicted, labels, 5))
        for number, (predicted, labels) in enumerate(images)
    ]
    assert predictions[5].value.miou == 1
    assert math.isnan(predictions[6].value.miou)
    for each, (predicted, labels) in zip(predictions[:5], images, strict=False):
        assert each.value.miou == pytest.approx(direct([(predicted, labels)], 5)["mIoU"])
        assert np.array_equal(each.value.labels, predicted.numpy())
    read: list[int] = []

    def load(index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        read.append(index)
        if len(read) == 2:
            raise DataError("gone")
        labels = images[index][1].numpy()
        return Image.new("RGB", labels.shape[::-1], (90, 120, 90)), labels

    path = tmp_path / "worst.png"
    draw_worst_segmentations(predictions, CLASSES, load, path)
    shown = [predictions[index].value.miou for index in read]
    assert shown == sorted(shown)
    assert sorted(read) == [0, 1, 2, 3, 4]
    with Image.open(path) as sheet:
        assert sheet.width > 1900
    draw_worst_segmentations(predictions[5:], CLASSES, load, path)
    assert not path.exists()
