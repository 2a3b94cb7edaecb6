"""The built-in images of shapes."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from vmamba.config import Section, describe_problems
from vmamba.data import AnnotatedImages, Decoding, DetectionData, SegmentationData, SegmentedImages
from vmamba.data.sources.shapes import KINDS, LEAST_VISIBLE, Shapes


class Detection(Section):
    data: DetectionData


class Segmentation(Section):
    data: SegmentationData


def detection(split: str = "train", **values: Any) -> AnnotatedImages:
    section = Detection.model_validate({"data": {"source": "shapes", **values}}).data
    source: AnnotatedImages = section.open(split)
    return source


def segmentation(split: str = "train", **values: Any) -> SegmentedImages:
    section = Segmentation.model_validate({"data": {"source": "shapes", **values}}).data
    source: SegmentedImages = section.open(split)
    return source


def test_lengths_classes_and_sizes() -> None:
    source = detection(train_images=30, sides=[40, 64])
    assert (len(source), len(detection("val"))) == (30, 100)
    assert source.classes == list(KINDS)
    assert segmentation().classes == ["background", *KINDS]
    sizes = {source.size(index) for index in range(30)}
    assert sizes == {(40, 64), (64, 40)}


@pytest.mark.parametrize("index", range(8))
def test_image_boxes_masks_and_labels_fit_each_other(index: int) -> None:
    source = detection()
    image, objects = source.load(index)
    assert (image.height, image.width) == objects.size == source.size(index)
    masks = objects.decoded_masks()
    assert len(masks) == len(objects) == len(objects.ids) >= 1
    assert int(masks.sum(0).max()) == 1  # the shape in front hides the others
    assert objects.areas.tolist() == masks.sum((1, 2)).tolist()
    for mask, box in zip(masks, objects.boxes.int().tolist(), strict=True):
        left, top, right, bottom = box
        assert mask[top:bottom, left:right].sum() == mask.sum()
        edges = (
            mask[top, left:right],
            mask[bottom - 1, left:right],
            mask[top:bottom, left],
            mask[top:bottom, right - 1],
        )
        assert all(edge.any() for edge in edges)
    _, labels = segmentation().load(index)
    expected = (masks * (objects.labels + 1)[:, None, None]).sum(0)
    assert np.array_equal(labels, expected.numpy())
    assert np.array_equal(segmentation().image(index), image)


def test_every_class_is_drawn_and_stays_visible() -> None:
    source = detection(train_images=40)
    assert source.class_counts().min() >= 5
    smallest = min(float(source.target(index).areas.min()) for index in range(40))
    # The smallest triangle, of which another shape may hide half.
    assert smallest > LEAST_VISIBLE * 3**1.5 / 4 * (0.1 * 128 - 1) ** 2


def test_colours_differ_from_the_background() -> None:
    for index in range(10):
        drawing = Shapes("train", 10, (128, 160), 0).draw(index)
        pixels = drawing.pixels.astype(int)
        for number in range(1, len(drawing.kinds) + 1):
            inside, outside = pixels[drawing.owner == number].mean(0), pixels[drawing.owner == 0].mean(0)
            assert np.abs(inside - outside).sum() > 60


def test_images_differ_by_seed_split_and_index() -> None:
    images = [
        np.asarray(source.image(index)).tobytes()
        for source in (detection(), detection("val"), detection(seed=1))
        for index in (0, 1)
    ]
    assert len(set(images)) == 6


def test_images_are_the_same_everywhere() -> None:
    digest = hashlib.sha256()
    for index in range(20):
        drawing = Shapes("train", 20, (128, 160), 0).draw(index)
        digest.update(drawing.pixels.tobytes() + drawing.owner.astype(np.uint8).tobytes())
    assert digest.hexdigest()[:16] == "c3e1bf7b714a58f7"


def test_other_channels_and_an_image_file() -> None:
    source = detection()
    source.decoding = Decoding(1, float_images=True)
    image, _ = source.load(0)
    assert isinstance(image, torch.Tensor)
    assert torch.equal(image, source.image(0))  # of the encoded file
    assert image.shape == (1, *source.size(0))


@pytest.mark.parametrize("sides", [[160, 128], [16, 64]])
def test_sides_that_do_not_work(sides: list[int]) -> None:
    with pytest.raises(ValidationError) as raised:
        detection(sides=sides)
    ((key, message),) = describe_problems(Detection, raised.value)
    assert key == "data.sides"
    assert "expected the shorter side, of at least 32 pixels" in message
