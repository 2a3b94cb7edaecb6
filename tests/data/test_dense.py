"""Datasets for detection and segmentation: samples, augmentation and batches."""

import colorsys
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from vmamba.data import (
    AnnotatedImages,
    Decoding,
    DetectionAugment,
    DetectionDataset,
    EpochSampler,
    Objects,
    Preprocessing,
    ResumableLoader,
    SampleKey,
    SegmentationAugment,
    SegmentationDataset,
    SegmentedImages,
    collate_dense,
    sampler_for,
    seeded,
)
from vmamba.data.dense import distort_colours
from vmamba.data.objects import decoded_masks, encoded_masks
from vmamba.data.sources.shapes import DetectionShapes, SegmentationShapes, Shapes
from vmamba.errors import DataError
from vmamba.sizes import scaled_size

PLAIN = {"hflip": 0.0, "short_sides": [64], "long_side": 1000}
SHAPES = Shapes("train", 6, (64, 80), 0)
THIRDS = Preprocessing(mean=(0.25, 0.5, 0.75), std=(0.5, 0.25, 0.125))


class Rectangles(AnnotatedImages):
    """Images (64, 80) in which each object is a rectangle of a colour of its own.

    Args:
        rectangles: Left, top, right and bottom of the objects of each image.
        changes: Fields of `Objects` for all images.
        sizes: Of the images, if they differ.
    """

    classes, category_ids = ["a", "b"], [1, 2]

    def __init__(
        self, rectangles: Sequence[Sequence[list[int]]], sizes: Sequence[tuple[int, int]] = (), **changes: Any
    ) -> None:
        self.boxes, self.changes = rectangles, changes
        self.sizes = list(sizes) or [(64, 80)] * len(rectangles)

    def __str__(self) -> str:
        return "rectangles"

    def __len__(self) -> int:
        return len(self.boxes)

    def open(self, index: int) -> str:
        raise AssertionError("the images are in memory")

    def load(self, index: int) -> tuple[Image.Image, Objects]:
        pixels = np.zeros((*self.sizes[index], 3), dtype=np.uint8)
        for number, (left, top, right, bottom) in enumerate(self.boxes[index]):
            pixels[top:bottom, left:right, number] = 255
        return Image.fromarray(pixels), self.target(index)

    def objects(self, index: int) -> Objects:
        height, width = self.sizes[index]
        masks = np.zeros((len(self.boxes[index]), height, width), dtype=np.uint8)
        for mask, (left, top, right, bottom) in zip(masks, self.boxes[index], strict=True):
            mask[top:bottom, left:right] = 1
        number = len(masks)
        objects = Objects(
            image_id=100 + index,
            size=(height, width),
            boxes=torch.tensor(self.boxes[index], dtype=torch.float32).reshape(-1, 4),
            labels=torch.arange(number) % 2,
            masks=encoded_masks(masks),
            areas=torch.from_numpy(masks.sum((1, 2)).astype(np.float32)),
            crowd=torch.zeros(number, dtype=torch.bool),
            ids=list(range(number)),
        )
        return replace(objects, **self.changes)

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def has_objects(self, index: int) -> bool:
        return len(self.boxes[index]) > 0

    def class_counts(self) -> np.ndarray:
        raise AssertionError("not needed")

    def name(self, index: int) -> str:
        return f"rectangles/{index}"

    def key(self, index: int) -> str:
        return str(index)


def detection(source: AnnotatedImages, **augment: Any) -> DetectionDataset:
    return DetectionDataset(source, 0, DetectionAugment(**{**PLAIN, **augment}))


def bounds(mask: torch.Tensor) -> list[int]:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def test_evaluation_sees_the_image_as_it_is() -> None:
    source = Rectangles([[], [[10, 20, 30, 40]]], crowd=torch.tensor([True]))
    dataset = DetectionDataset(source)
    assert (len(dataset), dataset.shapes_alike) == (2, None)
    sample = dataset[SampleKey(0, 1)]
    assert sample.keys() == {"image", "objects"}
    assert sample["image"].dtype == torch.float32
    assert torch.equal(sample["image"][0], sample["objects"].decoded_masks()[0].float())
    assert sample["objects"].crowd.tolist() == [True]


def test_a_training_sample_without_changes() -> None:
    boxes = [[10, 20, 30, 40], [40, 0, 80, 64], [4, 4, 5, 5]]
    sample = detection(Rectangles([boxes]))[SampleKey(0, 0)]
    target = sample["target"]
    assert target.keys() == {"boxes", "labels", "masks", "image_id"}
    assert target["boxes"].tolist() == boxes
    assert target["labels"].tolist() == [1, 2, 1]
    assert (target["masks"].dtype, target["image_id"].item()) == (torch.uint8, 100)
    assert torch.equal(target["masks"].float(), sample["image"])


def test_training_leaves_out_crowds_and_what_has_no_size() -> None:
    boxes = [[0, 0, 9, 9], [10, 0, 19, 9], [20, 0, 29, 9]]
    small = torch.tensor([[0, 0, 9, 9], [10, 0, 10.5, 9], [20, 0, 29, 9]])
    for changes, kept in (
        ({"crowd": torch.tensor([False, True, False])}, [1, 1]),
        ({"boxes": small}, [1, 1]),
        ({"areas": torch.tensor([0.0, 81, 81])}, [2, 1]),
    ):
        target = detection(Rectangles([boxes], **changes))[SampleKey(0, 0)]["target"]
        assert target["labels"].tolist() == kept
        assert len(target["masks"]) == len(target["boxes"]) == 2


def test_training_clips_boxes_that_evaluation_keeps() -> None:
    annotated = torch.tensor([[-5.0, 10, 20, 70], [-9, 0, -1, 9], [70, 60, 90.5, 80]])
    source = Rectangles([[[0, 10, 20, 64], [0, 0, 1, 9], [70, 60, 80, 64]]], boxes=annotated)
    target = detection(source)[SampleKey(0, 0)]["target"]
    assert target["boxes"].tolist() == [[0, 10, 20, 64], [70, 60, 80, 64]]
    evaluated = DetectionDataset(source)[SampleKey(0, 0)]["objects"]
    assert torch.equal(evaluated.boxes, annotated)


def test_masks_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = []

    def watched(codes: Sequence[Any], size: tuple[int, int]) -> torch.Tensor:
        numbers.append(len(codes))
        return decoded_masks(codes, size)

    monkeypatch.setattr("vmamba.data.dense.decoded_masks", watched)
    monkeypatch.setattr("vmamba.data.objects.decoded_masks", watched)
    boxes = [[10, 20, 30, 40], [40, 0, 80, 64], [4, 4, 9, 9]]
    detection(Rectangles([boxes]))[SampleKey(0, 0)]
    Rectangles([boxes]).target(0).turned(6)
    assert numbers == [1] * 6


def test_training_leaves_out_images(caplog: pytest.LogCaptureFixture) -> None:
    box = [[0, 0, 20, 20]]
    source = Rectangles([[], box, box, box], sizes=[(64, 80), (31, 80), (32, 80), (80, 64)])
    with caplog.at_level(logging.WARNING):
        dataset = detection(source)
    assert dataset.kept.tolist() == [2, 3]
    assert dataset.shapes_alike is not None
    assert dataset.shapes_alike.tolist() == [True, False]
    assert [dataset.name(index) for index in range(len(dataset))] == ["rectangles/2", "rectangles/3"]
    assert dataset[SampleKey(0, 1)]["target"]["image_id"] == 103
    expected = "training leaves out 1 image without objects and 1 more with a side under 32 pixels"
    assert expected in caplog.text
    with pytest.raises(DataError, match="rectangles: no image to train on"):
        detection(Rectangles([[]]))


def test_flips_are_exact() -> None:
    boxes = [[10, 20, 30, 40], [40, 0, 80, 64]]
    plain = detection(Rectangles([boxes]))[SampleKey(0, 0)]
    flipped = detection(Rectangles([boxes]), hflip=1.0)[SampleKey(0, 0)]
    assert torch.equal(flipped["image"], plain["image"].flip(-1))
    assert torch.equal(flipped["target"]["masks"], plain["target"]["masks"].flip(-1))
    assert flipped["target"]["boxes"].tolist() == [[50, 20, 70, 40], [0, 0, 40, 64]]


@pytest.mark.parametrize(
    ("short", "long", "size"), [(128, 1000, (128, 160)), (128, 120, (96, 120)), (33, 99, (33, 41))]
)
def test_resizing(short: int, long: int, size: tuple[int, int]) -> None:
    boxes = [[8, 16, 40, 48]]
    sample = detection(Rectangles([boxes]), short_sides=[short], long_side=long)[SampleKey(0, 0)]
    assert sample["image"].shape == (3, *size)
    assert sample["target"]["masks"].shape == (1, *size)
    factors = torch.tensor([size[1] / 80, size[0] / 64] * 2)
    assert torch.allclose(sample["target"]["boxes"], torch.tensor(boxes) * factors)
    assert np.allclose(bounds(sample["target"]["masks"][0]), sample["target"]["boxes"][0], atol=1)


def test_masks_are_resized_as_torch_does() -> None:
    masks = detection(DetectionShapes(SHAPES), short_sides=[97])
    plain = detection(DetectionShapes(SHAPES))
    for index in range(3):
        small, large = (data[SampleKey(0, index)]["target"]["masks"] for data in (plain, masks))
        expected = torch.nn.functional.interpolate(small[None].float(), large.shape[-2:])[0]
        assert torch.equal(large.float(), expected)


def crop_settings(**changes: Any) -> dict[str, Any]:
    """Crops without resizing: of (64, 80) pixels, sides from 20 to 40."""
    return {
        "crop_probability": 1.0,
        "crop_short_sides": [64],
        "crop_size": (20, 40),
        "long_side": 2000,
        **changes,
    }


def test_crops_are_exact() -> None:
    boxes = [[10, 20, 30, 40], [50, 0, 80, 30], [0, 60, 3, 64]]
    dataset = detection(Rectangles([boxes]), **crop_settings(short_sides=[20, 30]))
    numbers = set()
    for epoch in range(40):
        sample = dataset[SampleKey(epoch, 0)]
        image, target = sample["image"], sample["target"]
        numbers.add(len(target["boxes"]))
        assert min(image.shape[1:]) in (20, 30)
        assert (target["boxes"] >= 0).all()
        limit = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert (target["boxes"] <= limit + 1e-4).all()
        assert ((target["boxes"][:, 2:] - target["boxes"][:, :2]) >= 1).all()
        for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            assert np.allclose(bounds(mask), box, atol=1.6)  # a pixel of the crop may be 1.5 after resizing
    assert numbers >= {0, 1, 2}  # a crop may leave no objects


def test_a_crop_shows_the_image_there() -> None:
    gradient = Rectangles([[[10, 20, 30, 40]]])
    objects = gradient.target(0)
    pixels = np.arange(64 * 80, dtype=np.uint16).reshape(64, 80)
    coded = np.stack([pixels // 256, pixels % 256, np.zeros_like(pixels)], 2).astype(np.uint8)
    dataset = detection(gradient, **crop_settings(crop_size=(32, 32), short_sides=[32]))
    for number in range(10):
        with seeded("test", number):
            sample = dataset.augment(Image.fromarray(coded), objects)
        values = (sample["image"] * 255).round().int()
        first = int(values[0, 0, 0]) * 256 + int(values[1, 0, 0])
        top, left = divmod(first, 80)
        assert np.array_equal(values.numpy().transpose(1, 2, 0), coded[top : top + 32, left : left + 32])
        expected = objects.decoded_masks()[:, top : top + 32, left : left + 32]
        assert torch.equal(sample["target"]["masks"], expected[expected.sum((1, 2)) > 0])


def test_half_of_the_images_are_cropped() -> None:
    dataset = detection(Rectangles([[[10, 20, 30, 40]]]), **crop_settings(crop_probability=0.5))
    ratios = [dataset[SampleKey(epoch, 0)]["image"].shape for epoch in range(100)]
    whole = sum(shape == (3, 64, 80) for shape in ratios)
    assert 35 <= whole <= 65


def test_samples_are_a_function_of_seed_epoch_and_index() -> None:
    source = DetectionShapes(SHAPES)
    settings = DetectionAugment(**{**PLAIN, **crop_settings(hflip=0.5)})
    one, same, other = (DetectionDataset(source, seed, settings) for seed in (3, 3, 4))
    random.seed(99)
    samples = [
        data[SampleKey(epoch, 1)]["image"] for data, epoch in ((one, 0), (same, 0), (other, 0), (one, 1))
    ]
    assert torch.equal(samples[0], samples[1])
    assert not any(a.shape == samples[0].shape and torch.equal(a, samples[0]) for a in samples[2:])


def test_images_of_other_channels() -> None:
    source = DetectionShapes(SHAPES, Decoding(1, float_images=True))
    assert detection(source)[SampleKey(0, 0)]["image"].shape[0] == 1
    labels = SegmentationShapes(SHAPES, Decoding(1))
    gray = SegmentationDataset(
        labels, Preprocessing(channels=1, mean=(0.5,), std=(0.2,)), 0, SegmentationAugment(crop=32)
    )
    assert gray[SampleKey(0, 0)]["image"].shape == (1, 32, 32)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"short_sides": []}, "at least 1 item"),
        ({"short_sides": [0]}, "short_sides: expected at least 1 pixel"),
        ({"crop_size": [600, 384]}, "the first is above the second"),
        ({"hflip": 2.0}, "less than or equal to 1"),
    ],
)
def test_wrong_augmentation_of_detection(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DetectionAugment(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"base_size": [2048, 512]}, "expected the short side and then the long one"),
        ({"scale": [2.0, 0.5]}, "the smaller one first"),
        ({"scale": [0.0, 0.5]}, "two factors above 0"),
        ({"cat_max_ratio": 0.0}, "greater than 0"),
    ],
)
def test_wrong_augmentation_of_segmentation(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SegmentationAugment(**values)


class LabelMaps(SegmentedImages):
    """Images whose blue is their label map, as values of 50 times the label."""

    def __init__(self, labels: Sequence[np.ndarray]) -> None:
        self.maps, self.classes = labels, ["a", "b", "c"]

    def __len__(self) -> int:
        return len(self.maps)

    def open(self, index: int) -> str:
        raise AssertionError("the images are in memory")

    def load(self, index: int) -> tuple[Image.Image, np.ndarray]:
        labels = self.maps[index]
        return Image.fromarray(np.stack([np.zeros_like(labels), labels, labels * 50], 2)), labels

    def target(self, index: int) -> np.ndarray:
        return self.maps[index]

    def name(self, index: int) -> str:
        return str(index)

    def key(self, index: int) -> str:
        return str(index)


def blocks(height: int = 48, width: int = 64) -> np.ndarray:
    """A label map of three classes."""
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[:, width // 3 :] = 1
    labels[height // 2 :, : width // 2] = 2
    return labels


IDENTITY = {"hflip": 0.0, "base_size": (48, 1000), "scale": (1.0, 1.0), "crop": 32, "photometric": False}


def segmentation(labels: np.ndarray, **augment: Any) -> SegmentationDataset:
    settings = SegmentationAugment(**{**IDENTITY, **augment})
    return SegmentationDataset(LabelMaps([labels]), THIRDS, 0, settings)


def blue(sample: dict[str, torch.Tensor]) -> torch.Tensor:
    """The values from 0 to 255 of an image's third channel."""
    return (sample["image"][2] * 0.125 + 0.75) * 255


def test_segmentation_in_evaluation() -> None:
    sample = SegmentationDataset(LabelMaps([blocks(30, 50)]), THIRDS)[SampleKey(0, 0)]
    assert sample["image"].shape == (3, 30, 50)
    assert np.array_equal(sample["labels"], blocks(30, 50))
    assert sample["labels"].dtype == torch.uint8
    assert torch.allclose(sample["image"][0], torch.tensor(-0.5))  # (0 - mean) / std
    assert torch.allclose(blue(sample), sample["labels"] * 50.0, atol=1e-3)


def test_the_first_images_alone() -> None:
    maps = LabelMaps([blocks()] * 3)
    assert [len(SegmentationDataset(maps, THIRDS, limit=limit)) for limit in (None, 2, 9)] == [3, 2, 3]
    source = Rectangles([[], [[0, 0, 9, 9]], [[0, 0, 9, 9]], [[0, 0, 9, 9]]])
    assert DetectionDataset(source, limit=2).kept.tolist() == [0, 1]
    training = DetectionDataset(source, 0, DetectionAugment(**PLAIN), limit=2)
    assert training.kept.tolist() == [1, 2]
    assert training.shapes_alike is not None
    assert len(training.shapes_alike) == 2


def test_crops_and_flips_keep_pixels_and_labels_together() -> None:
    for hflip in (0.0, 1.0):
        dataset = segmentation(blocks(), hflip=hflip)
        starts = set()
        for epoch in range(8):
            sample = dataset[SampleKey(epoch, 0)]
            assert (sample["image"].shape, sample["labels"].dtype) == ((3, 32, 32), torch.int64)
            assert torch.allclose(blue(sample), sample["labels"] * 50.0, atol=1e-3)
            starts.add(sample["labels"].numpy().tobytes())
        assert len(starts) > 3


def test_small_images_are_padded() -> None:
    sample = segmentation(blocks(24, 20), base_size=(20, 1000))[SampleKey(0, 0)]
    assert (sample["image"].shape, sample["labels"].shape) == ((3, 32, 32), (32, 32))
    assert np.array_equal(sample["labels"][:24, :20], blocks(24, 20))
    outside = torch.ones(32, 32, dtype=torch.bool)
    outside[:24, :20] = False
    assert (sample["labels"][outside] == 255).all()
    assert (sample["image"][:, outside] == 0).all()


def test_scales() -> None:
    dataset = segmentation(blocks(), scale=(0.25, 0.5), crop=40)
    heights = set()
    for epoch in range(20):
        inside = dataset[SampleKey(epoch, 0)]["labels"] != 255
        height, width = int(inside.any(1).sum()), int(inside.any(0).sum())
        assert (height, width) == scaled_size((48, 64), height, 1000)
        heights.add(height)
    assert min(heights) >= 12
    assert max(heights) <= 24
    assert len(heights) > 5


def test_crops_of_one_class_are_drawn_again() -> None:
    labels = np.zeros((48, 200), dtype=np.uint8)
    labels[:, 150:170] = 1
    labels[:, 170:] = 255

    def shares(**settings: Any) -> list[float]:
        dataset = segmentation(labels, crop=24, **settings)
        counts = [
            torch.bincount(dataset[SampleKey(e, 0)]["labels"].flatten(), minlength=256)[:255]
            for e in range(40)
        ]
        return [float(count.max() / count.sum().clamp(min=1)) for count in counts]

    def too_many(shares: list[float]) -> int:
        return sum(share >= 0.75 for share in shares)

    # One crop in 11 has two classes of which neither has three quarters: so do 65 % of ten and one tries.
    assert too_many(shares(cat_max_ratio=1.0)) >= 30
    assert too_many(shares()) <= 24


def test_a_label_map_that_is_ignored_everywhere_or_of_one_class() -> None:
    for value in (255, 0):
        sample = segmentation(np.full((48, 64), value, dtype=np.uint8))[SampleKey(0, 0)]
        assert (sample["labels"] == value).all()


@pytest.fixture
def colours() -> Iterator[torch.Tensor]:
    with seeded("colours"):
        yield torch.rand(3, 20, 30)


def with_draws(
    monkeypatch: pytest.MonkeyPatch, chances: list[float], values: list[float], pixels: torch.Tensor
) -> torch.Tensor:
    """`distort_colours` with these outcomes of its draws."""
    monkeypatch.setattr(random, "random", iter(chances).__next__)
    drawn = iter(values)
    monkeypatch.setattr(random, "uniform", lambda low, high: next(drawn))
    return distort_colours(pixels)


def test_no_distortion_is_none(monkeypatch: pytest.MonkeyPatch, colours: torch.Tensor) -> None:
    assert torch.equal(with_draws(monkeypatch, [1.0] * 5, [], colours), colours)


def test_brightness_and_contrast(monkeypatch: pytest.MonkeyPatch, colours: torch.Tensor) -> None:
    brighter = with_draws(monkeypatch, [0.0, 0.0, 1.0, 1.0, 1.0], [51.0], colours)
    assert torch.allclose(brighter, (colours + 0.2).clamp(0, 1))
    for first in (0.0, 1.0):
        contrasted = with_draws(monkeypatch, [first, 1.0, 0.0, 1.0, 1.0], [1.5], colours)
        assert torch.allclose(contrasted, (colours * 1.5).clamp(0, 1))


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_saturation_is_that_of_hsv(
    monkeypatch: pytest.MonkeyPatch, colours: torch.Tensor, factor: float
) -> None:
    colours[:, 0] = colours[:1, 0]  # a gray row
    changed = with_draws(monkeypatch, [1.0, 1.0, 1.0, 0.0, 1.0], [factor], colours)
    for before, after in zip(colours.flatten(1).T.tolist(), changed.flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(hue, min(saturation * factor, 1), value)
        assert np.allclose(after, expected, atol=1e-5)


def test_hue_is_turned(monkeypatch: pytest.MonkeyPatch, colours: torch.Tensor) -> None:
    changed = with_draws(monkeypatch, [1.0, 1.0, 1.0, 1.0, 0.0], [0.1], colours)
    for before, after in zip(colours.flatten(1).T.tolist(), changed.flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        assert np.allclose(after, colorsys.hsv_to_rgb((hue + 0.1) % 1, saturation, value), atol=1e-5)


def test_distortion_stays_in_range_and_is_seeded(colours: torch.Tensor) -> None:
    images = []
    for seed in (1, 1, 2, 3):
        with seeded("distortion", seed):
            images.append(distort_colours(colours))
    assert torch.equal(images[0], images[1])
    assert all(image.min() >= 0 and image.max() <= 1 for image in images)
    assert len({image.numpy().tobytes() for image in images}) == 3


def test_batches_of_detection() -> None:
    source = DetectionShapes(SHAPES)
    samples = [detection(source)[SampleKey(0, index)] for index in range(2)]
    batch = collate_dense(samples)
    assert batch == {"images": [s["image"] for s in samples], "targets": [s["target"] for s in samples]}
    evaluated = collate_dense([DetectionDataset(source)[SampleKey(0, 0)]])
    assert evaluated.keys() == {"images", "objects"}


def test_batches_of_segmentation() -> None:
    dataset = segmentation(blocks())
    batch = collate_dense([dataset[SampleKey(epoch, 0)] for epoch in range(2)])
    assert (batch["images"].shape, batch["labels"].shape) == ((2, 3, 32, 32), (2, 32, 32))
    evaluated = collate_dense([SegmentationDataset(LabelMaps([blocks()]), THIRDS)[SampleKey(0, 0)]])
    assert [type(value) for value in evaluated.values()] == [list, list]


def test_batches_pass_through_workers() -> None:
    dataset = DetectionDataset(DetectionShapes(SHAPES))
    loader = ResumableLoader(
        dataset, EpochSampler(6, shuffle=False), collate_dense, batch_size=2, num_workers=1
    )
    batches = [loaded.batch for loaded in loader]
    assert [objects.image_id for batch in batches for objects in batch["objects"]] == list(range(6))
    expected = dataset[SampleKey(0, 5)]
    assert torch.equal(batches[2]["images"][1], expected["image"])
    assert batches[2]["objects"][1].masks == expected["objects"].masks


def test_lightning_leaves_objects_alone() -> None:
    from lightning.fabric.utilities import move_data_to_device

    batch = collate_dense([DetectionDataset(DetectionShapes(SHAPES))[SampleKey(0, 0)]])
    moved = move_data_to_device(batch, "meta")
    assert moved["images"][0].device.type == "meta"
    assert moved["objects"][0] is batch["objects"][0]


def test_training_pairs_images_that_lie_alike() -> None:
    source = DetectionShapes(Shapes("train", 21, (32, 40), 0))
    dataset = detection(source)
    sampler = sampler_for(dataset, True, seed=5)
    indices = [key.index for key in sampler]
    assert sorted(indices) == list(range(21))
    assert dataset.shapes_alike is not None
    alike = dataset.shapes_alike[indices]
    assert 0 < alike.sum() < 21
    assert (alike[0:20:2] == alike[1:20:2]).all()
    evaluated = sampler_for(DetectionDataset(source), False)
    assert [key.index for key in evaluated] == list(range(21))
