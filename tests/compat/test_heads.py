"""Heads of others on our backbones: segmentation-models-pytorch, torchvision, transformers. No download.

They come with the extra `compat`; run with -m compat. Decoders of segmentation-models-pytorch at their usual
strides are in test_tools.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

import vmamba  # noqa: F401  (registers the models)
from docs.blocks import ROOT, blocks
from vmamba.models.official import authors_names

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("default")]

BACKBONES = ["vmamba_pico", "convnext_atto"]
backbones = pytest.mark.parametrize("name", BACKBONES)


def check_gradients(backbone: nn.Module, loss: Tensor) -> None:
    """Every parameter of the backbone takes part, and its gradient is finite."""
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())


def stride_four(name: str) -> dict[str, Any]:
    """vmamba_pico is made for small images: with this its maps are at the strides 4 to 32."""
    return {"stem_stride": 4} if name.startswith("vmamba") else {}


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("decoder", ["DeepLabV3", "DeepLabV3Plus"])
@pytest.mark.parametrize("name", ["vmamba_tiny", "convnext_tiny"])
def test_deeplab_with_a_smaller_stride(name: str, decoder: str, stride: int) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    size: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}
    model = getattr(smp, decoder)(
        f"tu-{name}", encoder_weights=None, encoder_output_stride=stride, classes=3, **size
    )
    usual = timm.create_model(name, features_only=True, **size).eval()
    usual.load_state_dict(model.encoder.model.state_dict())
    images = torch.randn(2, 3, 64, 96)
    maps = model.encoder.eval()(images)[2:]  # before them come the image and an empty map
    for level, expected, reduction in zip(maps, usual(images), (4, 8, 16, 32), strict=False):
        side = min(reduction, stride)
        assert level.shape[2:] == (64 // side, 96 // side)
        if reduction <= stride:
            torch.testing.assert_close(level, expected)
    logits = model.train()(images)
    assert logits.shape == (2, 3, 64, 96)
    logits.square().mean().backward()
    assert all(p.grad.any() for name, p in model.encoder.named_parameters() if "stem" in name)


@backbones
def test_torchvisions_pyramid(name: str) -> None:
    backbone = timm.create_model(name, features_only=True, **stride_four(name))
    pyramid = FeaturePyramidNetwork(backbone.feature_info.channels(), 16)
    maps = backbone(torch.randn(2, 3, 64, 96))
    levels = pyramid(OrderedDict((str(i), level) for i, level in enumerate(maps)))
    assert [tuple(x.shape) for x in levels.values()] == [(2, 16, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    check_gradients(backbone, sum(x.square().mean() for x in levels.values()))


class WithPyramid(nn.Module):
    """A backbone as torchvision's detectors take it, which its `BackboneWithFPN` makes of its own models."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), channels)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(images))))


@backbones
def test_torchvisions_detector(name: str) -> None:
    torch.manual_seed(0)
    body = timm.create_model(name, features_only=True, **stride_four(name))
    detector = FasterRCNN(
        WithPyramid(body, 8),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (96,)), ((1.0,),) * 4),
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        min_size=64,
        max_size=96,
    )
    images = [torch.rand(3, 64, 96), torch.rand(3, 70, 70)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 40, 45]]), "labels": torch.tensor([1])}] * 2
    check_gradients(body, sum(detector(images, targets).values()))
    with torch.no_grad():
        (result, _) = detector.eval()(images)
    assert result["boxes"].shape[1] == 4


def timm_backbone(name: str, out_indices: tuple[int, ...]) -> Any:
    """The configuration of transformers' timm backbone; it has no arguments of the model itself."""
    transformers = pytest.importorskip("transformers")
    return transformers.TimmBackboneConfig(
        backbone=name, use_pretrained_backbone=False, out_indices=list(out_indices)
    )


@backbones
def test_transformers_backbone(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.AutoBackbone.from_config(timm_backbone(name, (1, 3))).eval()
    own = timm.create_model(name, features_only=True, out_indices=(1, 3)).eval()
    own.load_state_dict({key.removeprefix("_backbone."): p for key, p in backbone.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    maps = backbone(images).feature_maps
    assert backbone.channels == own.feature_info.channels()
    assert all(torch.equal(a, b) for a, b in zip(maps, own(images), strict=True))


@backbones
def test_transformers_upernet(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.UperNetConfig(
        backbone_config=timm_backbone(name, (0, 1, 2, 3)),
        hidden_size=16,
        auxiliary_in_channels=timm.create_model(name, features_only=True).feature_info.channels()[2],
        auxiliary_channels=8,
        num_labels=5,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    result = model(torch.randn(2, 3, 64, 64), labels=torch.randint(0, 5, (2, 64, 64)))
    assert result.logits.shape == (2, 5, 64, 64)
    check_gradients(model.backbone, result.loss)


@backbones
def test_transformers_mask2former(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Mask2FormerConfig(
        backbone_config=timm_backbone(name, (0, 1, 2, 3)),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5,
        train_num_points=64, num_labels=3,
    )  # fmt: skip
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    masks = torch.zeros(2, 64, 64)
    masks[0, :20, :30] = masks[1, 30:] = 1
    result = model(
        torch.randn(2, 3, 64, 64), mask_labels=[masks, masks], class_labels=[torch.tensor([0, 2])] * 2
    )
    assert result.class_queries_logits.shape == (2, 5, 4)
    check_gradients(model.model.pixel_level_module.encoder, result.loss)


@backbones
def test_transformers_detr(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DetrConfig(
        backbone_config=timm_backbone(name, (1, 2, 3)),
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, num_labels=3,
    )  # fmt: skip
    model = transformers.DetrForObjectDetection(config)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.2]])}] * 2
    result = model(torch.randn(2, 3, 64, 64), labels=labels)
    assert result.pred_boxes.shape == (2, 5, 4)
    check_gradients(model.model.backbone, result.loss)


def test_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/guides/other-heads.md that need what this tier installs."""
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    weights = authors_names(timm.create_model("vmamba_tiny").state_dict())
    torch.save({"model": weights}, "vssm_tiny.pth")
    page = ROOT / "docs" / "guides" / "other-heads.md"
    needing = [block for block in blocks(page) if block.not_run]
    assert len(needing) == 2
    for block in needing:
        exec(compile(block.text, str(block), "exec"), {})
