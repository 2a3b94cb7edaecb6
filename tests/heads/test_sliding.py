"""Windows, scales and mirror images against what they mean."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.heads import upernet
from vmamba.heads.sliding import SegmentedViews, best_classes, mean_probabilities, sliding

IMAGES = torch.randn(2, 3, 50, 71, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(2))


def near(images: Tensor) -> Tensor:
    """Logits that depend on a pixel's neighbours, and so on the window's border."""
    return F.conv2d(images, WEIGHT, padding=1)


@pytest.mark.parametrize(
    ("crop", "stride"), [((50, 71), (10, 10)), ((64, 96), (64, 32)), ((512, 512), (341, 341))]
)
def test_one_window_is_the_whole(crop: tuple[int, int], stride: tuple[int, int]) -> None:
    torch.manual_seed(0)
    args = {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}
    model = upernet("vmamba_tiny", 3, channels=8, aux_channels=8, **args).eval()
    with torch.no_grad():
        assert torch.equal(sliding(model, IMAGES, crop, stride), model(IMAGES))


@pytest.mark.parametrize(
    ("height", "crop", "stride", "starts"),
    [
        (10, 4, 3, [0, 3, 6]),
        (10, 4, 4, [0, 4, 6]),
        (10, 9, 9, [0, 1]),
        (11, 4, 3, [0, 3, 6, 7]),
        (4, 4, 1, [0]),
    ],
)
def test_windows_are_mmsegs(height: int, crop: int, stride: int, starts: list[int]) -> None:
    images = torch.arange(height, dtype=torch.float32).view(1, 1, height, 1).expand(1, 1, height, 5)
    seen = []

    def segmenter(window: Tensor) -> Tensor:
        seen.append(window.clone())
        return window

    assert torch.equal(sliding(segmenter, images, (crop, 5), (stride, 5)), images)
    assert [int(window[0, 0, 0, 0]) for window in seen] == starts
    assert all(window.shape == (1, 1, crop, 5) for window in seen)


def test_windows_are_averaged() -> None:
    expected, number = torch.zeros(2, 4, 50, 71), torch.zeros(50, 71)
    for top in (0, 16, 18):
        for left in (0, 30, 31):
            expected[:, :, top : top + 32, left : left + 40] += near(
                IMAGES[:, :, top : top + 32, left : left + 40]
            )
            number[top : top + 32, left : left + 40] += 1
    torch.testing.assert_close(sliding(near, IMAGES, (32, 40), (16, 30)), expected / number)


@pytest.mark.parametrize("stride", [(33, 10), (0, 10), (10, -1)])
def test_strides_that_leave_pixels_out(stride: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"stride: expected from 1 to the window's \(32, 32\)"):
        sliding(near, IMAGES, (32, 32), stride)


def test_probabilities_are_averaged_not_logits() -> None:
    parts, views = [], []
    for height, width in ((25, 36), (50, 71), (88, 124)):
        view = F.interpolate(IMAGES, (height, width), mode="bilinear") if height != 50 else IMAGES
        views.append(view)
        for logits in (near(view), near(view.flip(3)).flip(3)):
            parts.append(F.interpolate(logits, (50, 71), mode="bilinear").softmax(1))
    actual = mean_probabilities(near, views, (50, 71))
    torch.testing.assert_close(actual, torch.stack(parts).mean(0))
    torch.testing.assert_close(actual.sum(1), torch.ones(2, 50, 71))
    once = mean_probabilities(near, [IMAGES], (50, 71), flip=False)
    torch.testing.assert_close(once, near(IMAGES).softmax(1))


def test_scales_and_windows_together() -> None:
    by_windows = partial(sliding, near, crop=(32, 32), stride=(21, 21))
    actual = mean_probabilities(by_windows, [IMAGES], (50, 71), flip=False)
    torch.testing.assert_close(actual, sliding(near, IMAGES, (32, 32), (21, 21)).softmax(1))
    with pytest.raises(ValueError, match="views: expected at least one"):
        mean_probabilities(near, [], (50, 71))


def test_classes_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    logits[3] = logits[1]  # of equal ones the first
    expected = F.interpolate(logits[None], (9, 8), mode="bilinear").argmax(1)[0]
    for values in (1, 2 * 72, 10**9):
        monkeypatch.setattr("vmamba.heads.sliding._BLOCK", values)
        assert torch.equal(best_classes(logits, (9, 8)).long(), expected)


def test_views_are_resized_for_the_model_and_back() -> None:
    """By mmseg's rounding; several views give the mean of their probabilities, at the images' size."""
    seen: list[tuple[int, ...]] = []

    def model(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[2:]))
        return torch.cat([images, images.flip(1)], 1)

    images = torch.rand(2, 3, 30, 50, generator=torch.Generator().manual_seed(0))
    views = SegmentedViews(model, 16, 64)
    small = F.interpolate(images, (16, 27), mode="bilinear")
    expected = F.interpolate(torch.cat([small, small.flip(1)], 1), (30, 50), mode="bilinear")
    torch.testing.assert_close(views(images), expected)
    assert torch.equal(views.labels(images).long(), views(images).argmax(1))
    seen.clear()
    averaged = SegmentedViews(model, 16, 64, scales=(0.5, 2.0), flip=True)
    probabilities = averaged(images)
    assert seen == 2 * [(8, 13)] + 2 * [(32, 53)]
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 30, 50))
    assert torch.equal(averaged.labels(images).long(), probabilities.argmax(1))


@pytest.mark.parametrize("scales", [(1.0,), (1.0, 2.0)])
def test_views_tell_which_images_are_not_finite(scales: tuple[float, ...]) -> None:
    views = SegmentedViews(nn.Identity(), 50, 71, scales=scales, window=40)
    broken = IMAGES.clone()
    broken[1, 2, 49, 70] = torch.nan
    views.labels(broken)
    assert views.finite.tolist() == [True, False]
    views.labels(IMAGES)
    assert views.finite.tolist() == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": ()}, "scales: expected numbers above 0"),
        ({"scales": (0.0,)}, "scales: expected numbers above 0"),
        ({"stride": 4}, "stride: there is no window"),
        ({"window": 4, "stride": 5}, "stride: expected from 1 to the window's 4, got 5"),
    ],
)
def test_views_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentedViews(nn.Identity(), 8, 8, **options)
