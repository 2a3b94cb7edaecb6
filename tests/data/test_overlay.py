"""Objects and classes of pixels drawn over images."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from vmamba.data import overlay
from vmamba.data.overlay import FIRST_COLOURS, colour, contrast, draw_objects, draw_segmentation

NAMES = ["лиса", "a very long name of a class that does not fit beside any box", "狐", "line\nbreak $x$", ""]
BOX = torch.tensor([[60.0, 50, 200, 150]])
ONE, SCORE = torch.tensor([1]), torch.tensor([0.9])


def plain(width: int, height: int, value: int = 90) -> Image.Image:
    return Image.new("RGB", (width, height), (value, value, value))


def box_mask(box: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    mask = torch.zeros(1, *size, dtype=torch.uint8)
    left, top, right, bottom = box[0].int().tolist()
    mask[:, top:bottom, left:right] = 1
    return mask


def test_colours_differ_and_stay() -> None:
    colours = [colour(label) for label in range(150)]
    assert colours[:7] == list(FIRST_COLOURS)
    assert colours == [colour(label) for label in range(150)]
    assert colour(256) == colour(0)
    places = overlay._oklab(torch.tensor(colours))
    distances = torch.pdist(places)
    assert distances.min() > 0.04
    assert torch.pdist(places[:20]).min() > 0.1
    black_and_white = overlay._oklab(torch.tensor([[0, 0, 0], [255, 255, 255]]))
    assert torch.allclose(black_and_white, torch.tensor([[0.0, 0, 0], [1, 0, 0]]).double(), atol=1e-4)


def luminance(of: tuple[int, int, int]) -> float:
    """Relative, as WCAG defines it."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in of)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_names_can_be_read_on_every_colour() -> None:
    for label in range(150):
        darker, lighter = sorted(luminance(of) for of in (colour(label), contrast(colour(label))))
        assert (lighter + 0.05) / (darker + 0.05) > 4.5  # WCAG's least contrast of text


@pytest.mark.parametrize("background", [0, 128, 255])
def test_a_box_is_seen_on_any_background(background: int) -> None:
    for label in range(5):
        drawn = draw_objects(
            plain(300, 200, background), BOX, torch.tensor([label]), None, None, [str(n) for n in range(5)]
        )
        row = np.asarray(drawn)[100].astype(int)
        assert tuple(row[60]) == colour(label)
        assert tuple(row[59]) == contrast(colour(label))
        lights = sorted(luminance(of) for of in (colour(label), contrast(colour(label)), (background,) * 3))
        assert (lights[-1] + 0.05) / (lights[0] + 0.05) > 4.5
        assert (row[62:190] == background).all()  # the box is empty
        assert (row[:58] == background).all()


def test_boxes_over_the_border_are_drawn_at_it() -> None:
    over, at = (torch.tensor([box]) for box in ([-40.0, -9, 350, 280], [0.0, 0, 300, 200]))
    drawn = [np.asarray(draw_objects(plain(300, 200), box, ONE, SCORE, None, NAMES)) for box in (over, at)]
    assert np.array_equal(*drawn)


@pytest.mark.parametrize("coded", [False, True])
def test_a_mask_is_tinted_and_its_surroundings_are_not(coded: bool) -> None:
    masks: object = box_mask(BOX, (200, 300))
    if coded:
        pytest.importorskip("pycocotools", reason="pycocotools is not installed")
        from vmamba.data.objects import encoded_masks

        masks = encoded_masks(masks.numpy())  # type: ignore[attr-defined]
    whole = torch.tensor([[0.0, 0, 300, 200]])
    drawn = np.asarray(draw_objects(plain(300, 200), whole, ONE, None, masks, NAMES, legend=False))
    inside, outside = drawn[100, 130].astype(int), drawn[180, 250]
    toward = np.array(colour(1)) - 90
    assert (np.abs(inside - 90 - 0.42 * toward) <= 1).all()
    assert (outside == 90).all()
    assert tuple(drawn[100, 60]) == colour(1)  # the outline


@pytest.mark.parametrize(
    ("size", "expected"),
    [((8, 8), (256, 256)), ((100, 30), (300, 90)), ((256, 4), (256, 4)), ((900, 40), (900, 40))],
)
def test_small_images_are_enlarged_by_whole_factors(size: tuple[int, int], expected: tuple[int, int]) -> None:
    width, height = size
    box = torch.tensor([[0.0, 0, width, height]])
    image, labels = plain(width, height), np.zeros((height, width), np.uint8)
    assert draw_objects(image, box, ONE, SCORE, None, NAMES, legend=False).size == expected
    assert draw_segmentation(image, labels, NAMES, legend=False).size == expected
    with_legend = draw_objects(image, box, ONE, SCORE, box_mask(box, (height, width)), NAMES)
    assert with_legend.width >= expected[0]
    assert with_legend.height > expected[1]


def test_lines_and_letters_grow_with_the_image() -> None:
    for longer, line in ((600, 2), (6000, 15)):
        box = torch.tensor([[0.1, 0.2, 0.9, 0.9]]) * torch.tensor([longer, longer // 2] * 2)
        image = plain(longer, longer // 2)
        drawn = np.asarray(draw_objects(image, box, ONE, None, None, NAMES, legend=False))
        of_line = (drawn[drawn.shape[0] // 2, : longer // 2] == colour(1)).all(1)
        assert abs(of_line.sum() - line) <= 1


def test_a_given_side_scales_image_boxes_and_masks() -> None:
    image = plain(600, 400)
    image.paste((200, 0, 0), (120, 100, 400, 300))
    box = torch.tensor([[120.0, 100, 400, 300]])
    masks = box_mask(box, (400, 600))
    drawn = np.asarray(draw_objects(image, box, ONE, None, masks, NAMES, legend=False, side=300))
    assert drawn.shape == (200, 300, 3)
    assert tuple(drawn[100, 60]) == colour(1)
    assert (drawn[100, 40] == 90).all()
    assert drawn[100, 130, 0] > 130


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK", "tensor", "grey tensor"])
def test_any_kind_of_image(mode: str) -> None:
    image = plain(300, 200) if "tensor" in mode else plain(300, 200).convert(mode)
    decoded = {"tensor": torch.rand(3, 200, 300), "grey tensor": torch.rand(1, 200, 300)}.get(mode, image)
    masks = box_mask(BOX, (200, 300))
    for drawn in (
        draw_objects(decoded, BOX, ONE, SCORE, masks, NAMES, legend=False),
        draw_segmentation(decoded, masks[0], NAMES, legend=False),
    ):
        assert (drawn.mode, drawn.size) == ("RGB", (300, 200))


def test_names_in_a_crowd_never_cover_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    canvases = []

    class Recorded(overlay._Canvas):
        def __init__(self, image: Image.Image, side: int | None) -> None:
            super().__init__(image, side)
            canvases.append(self)

    monkeypatch.setattr(overlay, "_Canvas", Recorded)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(120, 2, generator=generator) * torch.tensor([500, 380])
    boxes = torch.cat([corner, corner + 5 + 100 * torch.rand(120, 2, generator=generator)], dim=1)
    labels, scores = torch.arange(120) % len(NAMES), torch.rand(120, generator=generator)
    draw_objects(plain(640, 480), boxes, labels, scores, None, NAMES)
    names = canvases[0]._names
    assert 30 < len(names) < 120
    for one, other in combinations(names, 2):
        assert not overlay._overlap(one, other)
    assert all(0 <= x1 < x2 <= 640 and 0 <= y1 < y2 <= 480 for x1, y1, x2, y2 in names)


def test_boxes_at_and_beyond_the_border_and_without_extent() -> None:
    boxes = torch.tensor([[-30.0, -30, 20, 20], [250, 150, 400, 300], [50, 50, 50, 50], [0, 0, 300, 200]])
    masks = torch.zeros(4, 200, 300, dtype=torch.bool)
    masks[0, :20, :20] = masks[1, 199, 299] = masks[3] = True
    drawn = draw_objects(plain(300, 200), boxes, torch.arange(4), torch.rand(4), masks, NAMES)
    assert drawn.width == 300


def test_nothing_to_draw() -> None:
    none = torch.zeros(0, 4)
    drawn = draw_objects(
        plain(300, 200), none, torch.zeros(0).long(), torch.zeros(0), torch.zeros(0, 200, 300), NAMES
    )
    assert np.array_equal(np.asarray(drawn), np.asarray(plain(300, 200)))


def test_classes_are_tinted_and_the_rest_is_not() -> None:
    labels = np.full((100, 150), 255, np.uint8)  # stretched over an image of twice the size
    labels[20:60, 30:90] = 2
    image = plain(300, 200)
    drawn = np.asarray(draw_segmentation(image, labels, NAMES, legend=False)).astype(int)
    toward = np.array(colour(2)) - 90
    assert (np.abs(drawn[80, 120] - 90 - 165 / 255 * toward) <= 1).all()
    assert (drawn[150, 250] == 90).all()
    assert draw_segmentation(image, torch.from_numpy(labels).long(), NAMES).height > 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": torch.zeros(2, 4)}, r"boxes: expected \(1, 4\), by the labels, got \(2, 4\)"),
        ({"labels": torch.tensor([9])}, r"labels: expected 0 to 4, got \[9\]"),
        ({"scores": torch.zeros(3)}, "scores: expected 1, by the labels, got 3"),
        (
            {"masks": torch.zeros(1, 5, 5)},
            r"masks\[0\]: expected the image's size \(200, 300\), got \(5, 5\)",
        ),
    ],
)
def test_objects_that_do_not_fit(changes: dict[str, torch.Tensor], message: str) -> None:
    arguments = {"boxes": BOX, "labels": ONE, "scores": SCORE, "masks": None, **changes}
    with pytest.raises(ValueError, match=message):
        draw_objects(plain(300, 200), names=NAMES, **arguments)


@pytest.mark.parametrize("label", [5, 300, -1])
def test_classes_without_a_name(label: int) -> None:
    with pytest.raises(ValueError, match=f"labels: expected 0 to 4 or 255, got {label}"):
        draw_segmentation(plain(4, 4), np.full((4, 4), label), NAMES)
