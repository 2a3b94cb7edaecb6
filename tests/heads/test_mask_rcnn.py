"""Mask R-CNN: mmdet's numbers, each part by its definition, targets of every kind, and names."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

import vmamba
from vmamba.errors import CheckpointError, ModelError
from vmamba.heads import Features, MaskRCNN, mask_rcnn, mmdet_names
from vmamba.heads.boxes import BoxCoder, Matcher, PyramidAnchors
from vmamba.heads.masks import mask_targets, paste_masks
from vmamba.heads.names import from_mmdet
from vmamba.heads.proposals import PADDED_SIZE
from vmamba.heads.regions import RegionFeatures, region_levels
from vmamba.sizes import scaled_size

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import parity

DATA = Path(__file__).parents[1] / "data"


class Body(nn.Module):
    """Four convolutions: maps at strides 4 to 32."""

    channels = (4, 4, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, *self.channels), (4, 2, 2, 2)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in zip(widths, widths[1:], strides, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            x = layer(x).relu()
            maps.append(x)
        return maps


def micro(**settings: Any) -> MaskRCNN:
    defaults = {"num_classes": 4, "channels": 8, "hidden": 16, "min_size": 64, "max_size": 128}
    return mask_rcnn(Body(), **{**defaults, **settings})


def target(boxes: list[list[float]], size: tuple[int, int]) -> dict[str, Tensor]:
    """Objects whose masks fill their boxes."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = 1
    labels = 1 + torch.arange(len(boxes)) % 3
    return {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": labels, "masks": masks}


def test_mmdets_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.check(DATA / "mask_rcnn_micro.safetensors"), capsys.readouterr().out
    assert "not checked" not in capsys.readouterr().out


@pytest.mark.parametrize("size", [33, 40, 75, 800, 801])
def test_anchors_of_the_last_level_lie_64_apart(size: int) -> None:
    """Whether the image is padded or not."""
    for side in (size, -(-size // 32) * 32):
        sides = [-(-side // stride) for stride in (4, 8, 16, 32, 64)]
        maps = [torch.zeros(1, 1, n, n + 2) for n in sides]
        image = ImageList(torch.zeros(1, 3, side, side), [(size, size)])
        (anchors,) = PyramidAnchors()(image, maps)
        last = anchors[-3 * maps[-1][0].numel() :].reshape(sides[-1], sides[-1] + 2, 3, 4)
        centres = (last[..., :2] + last[..., 2:]) / 2
        expected = 64.0 * torch.stack(
            torch.meshgrid(torch.arange(sides[-1] + 2), torch.arange(sides[-1]), indexing="xy"), dim=-1
        )
        torch.testing.assert_close(centres, expected[:, :, None].expand_as(centres), atol=1e-4, rtol=0)
        areas = (last[..., 2:] - last[..., :2]).prod(dim=-1)
        torch.testing.assert_close(areas, torch.full_like(areas, 512.0**2))


def test_boxes_are_coded_and_decoded() -> None:
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    proposals = torch.tensor([[10.0, 20.0, 30.0, 60.0], [0.0, 0.0, 8.0, 8.0]])
    boxes = torch.tensor([[12.0, 22.0, 36.0, 50.0], [4.0, 0.0, 5.0, 8.0]])
    (codes,) = coder.encode([boxes], [proposals])
    expected = [10 * 4 / 20, 10 * -4 / 40, 5 * torch.tensor(24 / 20).log(), 5 * torch.tensor(28 / 40).log()]
    torch.testing.assert_close(codes[0], torch.tensor(expected))
    torch.testing.assert_close(coder.decode(codes, [proposals])[:, 0], boxes)


def test_a_side_changes_at_most_by_its_limit() -> None:
    codes = torch.tensor([[0.0, 0.0, 100.0, -100.0]])
    box = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode(codes, [torch.tensor([[-8.0, -8.0, 8.0, 8.0]])])[0, 0]
    torch.testing.assert_close(box, torch.tensor([-500.0, -0.128, 500.0, 0.128]))


def test_an_objects_best_box_is_its_own() -> None:
    overlaps = torch.tensor(
        [
            [0.9, 0.75, 0.5, 0.1, 0.0],
            [0.8, 0.10, 0.4, 0.2, 0.0],  # its best box overlaps the first object more
            [0.0, 0.00, 0.0, 0.0, 0.25],  # its best box is not good enough
        ]
    )
    assert Matcher(0.7, 0.3, 0.3)(overlaps).tolist() == [1, 0, -2, -1, -1]
    assert Matcher(0.7, 0.3, 0.25)(overlaps).tolist() == [1, 0, -2, -1, 2]


def test_levels_of_regions() -> None:
    sides = torch.tensor([0.0, 10.0, 111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 5000.0])
    boxes = torch.stack([torch.ones_like(sides), torch.ones_like(sides), 1 + sides, 1 + sides], dim=1)
    assert region_levels(boxes).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_regions_of_a_slope() -> None:
    """Aligned: in a map whose values are the positions' places in the image, each bin holds its centre."""
    place = torch.arange(64.0)[None, None, None] * 4 + 2  # centres of positions 4 pixels wide
    level = place.expand(1, 1, 64, 64)
    box = torch.tensor([[20.0, 40.0, 76.0, 96.0]])
    squares = RegionFeatures(7)({"0": level, "1": level, "2": level, "3": level}, [box])
    torch.testing.assert_close(squares[0, 0, 3], 20 + 8 * (torch.arange(7) + 0.5))


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), (800, 1067)), ((640, 427), (1199, 800)), ((100, 1000), (133, 1333))]
)
def test_sizes_are_rounded(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert scaled_size(size, 800, 1333) == expected


def test_pasted_masks_cover_the_pixels_whose_centres_are_inside() -> None:
    boxes = torch.tensor([[2.4, 3.6, 9.5, 6.4], [-3.0, -2.0, 4.0, 30.0], [5.0, 5.0, 5.0, 9.0]])
    pasted = paste_masks(torch.ones(3, 1, 28, 28), boxes, (12, 16))[:, 0] >= 0.5
    x, y = torch.arange(16) + 0.5, torch.arange(12)[:, None] + 0.5
    for mask, (x1, y1, x2, y2) in zip(pasted[:2], boxes[:2], strict=True):
        assert torch.equal(mask, (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2))
    assert paste_masks(torch.ones(0, 1, 28, 28), boxes[:0], (12, 16)).shape == (0, 1, 12, 16)


def test_mask_targets_are_binary() -> None:
    masks = torch.zeros(2, 20, 20)
    masks[1, :, 5:] = 1
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 80.0], [1.0, 1.0, 9.0, 9.0]])
    targets = mask_targets(masks, boxes, torch.tensor([1, 1, 0]), 4)
    assert targets[0].tolist() == targets[1].tolist() == [[0, 0, 1, 1]] * 4  # the bin from 4 to 6 is half in
    assert not targets[2].any()


def test_losses_of_the_proposal_network() -> None:
    """L1, over the number of sampled anchors; fewer than 256 anchors are all sampled."""
    network = micro().rpn
    labels = torch.tensor([1.0, 0.0, -1.0, 1.0, 0.0])
    logits, codes, expected = torch.randn(5, 1), torch.randn(5, 4), torch.randn(5, 4)
    objectness, boxes = network.compute_loss(logits, codes, [labels], [expected])
    sure = torch.tensor([0, 1, 3, 4])
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits[sure, 0], labels[sure])
    torch.testing.assert_close(objectness, cross_entropy)
    torch.testing.assert_close(boxes, (codes - expected)[[0, 3]].abs().sum() / 4)


def test_anchors_beside_an_image_are_not_learnt() -> None:
    network = micro().rpn
    anchors = torch.tensor([[x - 8.0, 0.0, x + 8.0, 16.0] for x in (0, 28, 32, 60)])
    size = {PADDED_SIZE: (64, 32)}
    labels, _ = network.assign_targets_to_anchors(
        [anchors, anchors],
        [{"boxes": anchors.new_zeros(0, 4), **size}, {"boxes": torch.tensor([[21.0, 0, 35, 16]]), **size}],
    )
    assert [each.tolist() for each in labels] == [[0, 0, -1, -1], [0, 1, -1, -1]]


def test_objects_with_the_same_box_keep_their_classes() -> None:
    heads = micro().roi_heads
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    proposals = torch.cat([torch.tensor([[0.0, 0.0, 10.0, 9.0], [50.0, 50.0, 60.0, 60.0]]), box, box])
    matches, labels = heads.assign_targets_to_proposals(
        [proposals], [torch.cat([box, box])], [torch.tensor([1, 3])]
    )
    assert labels[0].tolist() == [3, 0, 1, 3]
    assert matches[0].tolist()[2:] == [0, 1]


def test_training_reaches_every_weight() -> None:
    model = micro()
    images = [torch.rand(3, 70, 90), torch.rand(3, 128, 64)]
    targets = [target([[5, 5, 60, 50], [30.5, 20, 80, 69]], (70, 90)), target([[0, 0, 64, 128]], (128, 64))]
    before = [{key: value.clone() for key, value in each.items()} for each in targets]
    losses = model(images, targets)
    assert set(losses) == {
        *("loss_objectness", "loss_rpn_box_reg"),
        *("loss_classifier", "loss_box_reg", "loss_mask"),
    }
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    predictor = model.roi_heads
    assert not predictor.box_predictor.bbox_pred.weight.grad[:4].any()  # nothing reads the background's box
    assert not predictor.mask_predictor.mask_fcn_logits.weight.grad[:1].any()
    for each, old in zip(targets, before, strict=True):  # the caller's targets are as they were
        assert all(torch.equal(each[key], old[key]) for key in old)


def test_images_without_objects_are_learnt_as_background() -> None:
    model = micro()
    empty = target([], (64, 64))
    losses = model([torch.rand(3, 64, 64)], [empty])
    assert losses["loss_rpn_box_reg"] == losses["loss_box_reg"] == losses["loss_mask"] == 0
    assert losses["loss_classifier"] > 0
    sum(losses.values()).backward()
    losses = model([torch.rand(3, 50, 64)] * 2, [target([], (50, 64)), target([[3, 3, 40, 40]], (50, 64))])
    assert all(loss.isfinite() for loss in losses.values())


def test_training_at_the_final_size() -> None:
    model = micro(resize_in_training=False)
    batch, _ = model.transform([torch.rand(3, 33, 45)], [target([[1, 1, 20, 20]], (33, 45))])
    assert batch.image_sizes == [(33, 45)]
    assert batch.tensors.shape == (1, 3, 64, 64)


def test_targets_move_with_their_image() -> None:
    model = micro(min_size=[64])
    (image, moved) = model.transform([torch.rand(3, 128, 200)], [target([[20, 40, 100, 120]], (128, 200))])
    assert image.image_sizes == [(64, 100)]
    assert image.tensors.shape == (1, 3, 64, 128)
    assert moved[0]["boxes"].tolist() == [[10, 20, 50, 60]]
    assert moved[0]["masks"].shape == (1, 64, 128)
    assert moved[0]["masks"][0].nonzero().aminmax(dim=0).max.tolist() == [59, 49]


def test_detections_are_in_the_images_frame() -> None:
    model = micro(score_threshold=0.0, detections=7).eval()
    sizes = [(50, 80), (200, 30)]
    results = model([torch.rand(3, *size) for size in sizes])
    for result, (height, width) in zip(results, sizes, strict=True):
        assert result["boxes"].shape == (7, 4)
        assert result["masks"].shape == (7, 1, height, width)
        assert result["labels"].min() >= 1
        assert result["scores"].tolist() == sorted(result["scores"].tolist(), reverse=True)
        limits = torch.tensor([width, height, width, height]) + 1e-3
        assert (result["boxes"] <= limits).all()
    (nothing,) = micro(score_threshold=1.0).eval()([torch.rand(3, 64, 64)])
    assert nothing["boxes"].shape == (0, 4)
    assert nothing["masks"].shape == (0, 1, 64, 64)


def change(**values: Any) -> dict[str, Any]:
    return {**target([[5, 5, 20, 20]], (64, 64)), **values}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"boxes": torch.zeros(0, 4)}, r"targets\[1\]: lacks labels, masks"),
        (change(boxes=torch.zeros(1, 4)), r"targets\[1\]\['boxes'\]\[0\]: .* x1 < x2"),
        (
            change(boxes=torch.tensor([[9.0, 9, 2, 20]])),
            r"\[0\]: .*got \[9\.0, 9\.0, 2\.0, 20\.0\]",
        ),
        (change(boxes=torch.tensor([[0.0, 0, float("inf"), 2]])), r"expected finite"),
        (change(boxes=torch.tensor([[float("nan"), 0, 5, 2]])), r"expected finite"),
        (change(boxes=torch.ones(1, 5)), r"\['boxes'\]: expected floats of shape \(n, 4\)"),
        (change(boxes=torch.tensor([[1, 1, 5, 5]])), r"\['boxes'\]: expected floats"),
        (change(labels=torch.tensor([0])), r"\['labels'\]\[0\]: expected 1 to 3 .*, got 0"),
        (change(labels=torch.tensor([4])), r"\['labels'\]\[0\]: expected 1 to 3 .*, got 4"),
        (change(labels=torch.tensor([1, 2])), r"\['labels'\]: expected int64 of shape \(1,\)"),
        (change(masks=torch.zeros(1, 32, 64)), r"\['masks'\]: expected the image's size, \(1, 64, 64\)"),
    ],
)
def test_targets_are_refused_by_name(bad: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro()([torch.rand(3, 64, 64)] * 2, [change(), bad])


def test_images_and_backbones_are_refused_by_name() -> None:
    model = micro()
    with pytest.raises(ValueError, match="targets: expected one for each of 1 images, got none"):
        model([torch.rand(3, 64, 64)])
    with pytest.raises(ValueError, match=r"images\[0\]: expected a float tensor"):
        model.eval()([torch.zeros(3, 64, 64, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="images: expected at least one"):
        model([])
    with pytest.raises(TypeError, match="Linear does not say how many channels"):
        mask_rcnn(nn.Linear(1, 1))
    body = Body()
    body.channels = (4, 4, 8)
    with pytest.raises(ValueError, match="expected four maps at strides"):
        mask_rcnn(body)
    body.channels = (4, 4, 8, 9)
    with pytest.raises(ValueError, match=r"four maps .* of \[4, 4, 8, 9\] channels"):
        mask_rcnn(body).eval()([torch.rand(3, 64, 64)])
    with pytest.raises(TypeError, match="nonsense"):
        micro(nonsense=1)
    with pytest.raises(ValueError, match="num_classes: expected at least 2"):
        micro(num_classes=1)
    with pytest.raises(ModelError, match="no_such_model"):
        mask_rcnn("no_such_model")


def small() -> MaskRCNN:
    features = Features.create("vmamba_pico", stem_stride=4)
    return mask_rcnn(features, num_classes=4, channels=8, hidden=16)


def test_mmdets_names_and_back(tmp_path: Path) -> None:
    source, path = small(), tmp_path / "epoch_12.pth"
    theirs = mmdet_names(source.state_dict())
    assert {name.partition(".")[0] for name in theirs} == {"backbone", "neck", "rpn_head", "roi_head"}
    assert "backbone.layers.0.blocks.0.op.A_logs" in theirs
    assert "backbone.outnorm3.weight" in theirs
    assert theirs["roi_head.bbox_head.fc_reg.weight"].shape == (3 * 4, 16)
    scores = source.roi_heads.box_predictor.cls_score.bias
    assert torch.equal(theirs["roi_head.bbox_head.fc_cls.bias"], scores[[1, 2, 3, 0]])
    torch.save({"state_dict": theirs, "meta": {"epoch": 12}}, path)
    loaded = small()
    report = vmamba.load_weights(loaded, path)
    assert not report.missing
    assert not report.left_out
    for name, weight in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    vmamba.load_weights(loaded, source.state_dict())  # ours too


def test_a_detector_that_lacks_weights_is_refused() -> None:
    source = small()
    theirs = mmdet_names(source.state_dict())
    del theirs["neck.fpn_convs.2.conv.bias"]
    theirs["roi_head.bbox_head.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        vmamba.load_weights(source, theirs)
    assert "missing: backbone.fpn.layer_blocks.2.0.bias" in str(error.value)
    assert "unexpected: roi_head.bbox_head.extra" in str(error.value)


def test_a_detector_for_other_classes_keeps_its_own_predictors() -> None:
    theirs = mmdet_names(small().state_dict())
    features = Features.create("vmamba_pico", stem_stride=4)
    model = mask_rcnn(features, num_classes=3, channels=8, hidden=16)
    report = vmamba.load_weights(model, theirs, classifier="new")
    layers = ("box_predictor.bbox_pred", "box_predictor.cls_score", "mask_predictor.mask_fcn_logits")
    expected = {f"roi_heads.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(report.missing) == expected
    assert torch.equal(model.backbone.fpn.inner_blocks[0][0].bias, theirs["neck.lateral_convs.0.conv.bias"])


def test_other_names_pass() -> None:
    weights = {"backbone.body.x": torch.ones(2), "rpn.head.conv.0.0.bias": torch.ones(1)}
    assert from_mmdet(weights) == weights
