"""Feature maps of any model: their sizes and norms, and the weights that they begin from."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from authors import authors_names
from vmamba.errors import CheckpointError, ModelError
from vmamba.heads import Features
from vmamba.heads.features import backbone_names
from vmamba.models.weights import load_weights

SMALL = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64)}
BACKBONES: dict[str, dict[str, Any]] = {
    "vmamba_tiny": SMALL,
    "swin_tiny_patch4_window7_224": {"depths": (1, 2, 1, 2), "embed_dim": 8, "num_heads": (1, 1, 2, 2)},
    "swinv2_tiny_window8_256": {"depths": (1, 2, 1, 2), "embed_dim": 8, "num_heads": (1, 1, 2, 2)},
    "convnext_tiny": SMALL,
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (4, 8, 16, 32)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 32, 64), "num_heads": (1, 1, 2, 2)},
}
IMAGES = torch.randn(2, 3, 75, 133, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def classifier() -> Any:
    torch.manual_seed(7)
    model = timm.create_model("vmamba_tiny", num_classes=10, **SMALL)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def backbone(**changes: Any) -> Features:
    return Features.create("vmamba_tiny", **{**SMALL, **changes}).eval()


def of_a_detector(classifier: nn.Module) -> dict[str, Tensor]:
    """The authors' backbone in a file of mmdet, and a module behind it."""
    weights = {
        f"backbone.{name}": value
        for name, value in authors_names(classifier.state_dict()).items()
        if not name.startswith("classifier.")
    }
    for i, dim in enumerate(SMALL["dims"]):
        weights[f"backbone.outnorm{i}.weight"] = torch.full((dim,), 2.0)
        weights[f"backbone.outnorm{i}.bias"] = torch.full((dim,), 0.5)
    return {**weights, "neck.lateral_convs.0.conv.weight": torch.zeros(1)}


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_of_any_model_at_any_size(name: str) -> None:
    features = Features.create(name, **BACKBONES[name]).eval()
    maps = features(IMAGES)
    assert features.strides == (4, 8, 16, 32)
    assert [m.shape[1] for m in maps] == list(features.channels)
    down = name == "convnext_tiny"  # its convolutions have no padding
    for level, stride in zip(maps, features.strides, strict=True):
        size = (75 // stride, 133 // stride) if down else (-(-75 // stride), -(-133 // stride))
        assert level.shape[2:] == size
    sum(level.sum() for level in maps).backward()
    # A parameter behind the maps would stop distributed training.
    assert not [key for key, parameter in features.named_parameters() if parameter.grad is None]
    norms = {key for key, _ in features.named_parameters() if key.startswith("outnorm")}
    assert norms == {f"outnorm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    plain = Features.create(name, norm=False, **BACKBONES[name]).eval()
    plain.model.load_state_dict(features.model.state_dict())
    assert all(key.startswith("model.") for key in plain.state_dict())
    for level, expected in zip(plain(IMAGES), maps, strict=True):
        normed = nn.functional.layer_norm(level.movedim(1, -1), level.shape[1:2]).movedim(-1, 1)
        torch.testing.assert_close(normed, expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    features = Features.create(name, norm=False, **BACKBONES[name]).eval()
    parameters = list(features.parameters())
    results = []
    for enable in (False, True):
        features.set_grad_checkpointing(enable)
        calls: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, calls=calls: calls.append(1) or t, lambda t: t
        ):
            loss = sum(level.square().mean() * (i + 1) for i, level in enumerate(features(IMAGES)))
        results.append((len(calls), torch.autograd.grad(loss, parameters)))
    (many, expected), (few, gradients) = results
    assert few < many
    torch.testing.assert_close(gradients, expected)


def test_weights_of_a_classifier(classifier: Any, tmp_path: Path) -> None:
    expected = classifier.forward_intermediates(IMAGES, intermediates_only=True)
    path = tmp_path / "vssm.pth"
    theirs = authors_names(classifier.state_dict())
    torch.save({"model": theirs, "model_ema": {name: value * 2 for name, value in theirs.items()}}, path)
    for source in (path, classifier.state_dict()):
        features = backbone(norm=False, checkpoint=source)
        assert all(torch.equal(a, b) for a, b in zip(features(IMAGES), expected, strict=True))
    features = backbone()
    report = features.load(path)
    assert sorted(report.left_out) == ["head.fc.bias", "head.fc.weight", "norm.bias", "norm.weight"]
    assert sorted({name.partition(".")[0] for name in report.missing}) == [f"outnorm{i}" for i in range(4)]
    average = backbone(checkpoint=path, weights="ema")
    assert torch.equal(average.model.stem.conv1.weight, 2 * classifier.stem.conv1.weight)


def test_weights_of_a_detector(classifier: Any) -> None:
    weights = {"state_dict": of_a_detector(classifier), "meta": {"epoch": 12}}
    features = backbone()
    report = features.load(weights)
    assert report.elsewhere == ["neck.lateral_convs.0.conv.weight"]
    assert not report.missing
    assert not report.left_out
    raw = classifier.forward_intermediates(IMAGES, intermediates_only=True)
    for level, expected in zip(features(IMAGES), raw, strict=True):
        normed = nn.functional.layer_norm(expected.movedim(1, -1), expected.shape[1:2]).movedim(-1, 1)
        torch.testing.assert_close(level, 2 * normed + 0.5)
    again = backbone(checkpoint=features.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again(IMAGES), features(IMAGES), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "gate": True,
            "ssm_conv_bias": True,
            "d_state": 2,
            "mlp_ratio": 0.0,
            "stem": "patch",
            "downsample": "merge",
        },
    ],
)
def test_names_are_turned_back(settings: dict[str, Any]) -> None:
    features = backbone(**settings)
    theirs = backbone_names(features.state_dict())
    outside = {name for name in theirs if not name.startswith(("layers.", "patch_embed."))}
    assert outside == {f"outnorm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    if not settings:
        expected = {
            name.removeprefix("backbone.")
            for name in of_a_detector(timm.create_model("vmamba_tiny", **SMALL))
        }
        assert set(theirs) == {name for name in expected if not name.startswith(("classifier.", "neck."))}
    again = backbone(**settings, checkpoint={f"backbone.{name}": value for name, value in theirs.items()})
    for name, value in features.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_weights_that_do_not_fit_are_named(classifier: Any) -> None:
    features = backbone()
    before = {name: value.clone() for name, value in features.state_dict().items()}
    weights = of_a_detector(classifier)
    del weights["backbone.layers.1.blocks.0.op.out_proj.weight"]
    weights["backbone.outnorm2.bias"] = torch.zeros(5)
    weights["backbone.layers.0.blocks.3.norm.weight"] = torch.zeros(8)
    with pytest.raises(CheckpointError) as error:
        features.load(weights)
    for line in (
        "missing: model.stages.1.blocks.0.op.out_proj.weight (16, 32)",
        "shape: outnorm2.bias expected (32,), got (5,)",
        "unexpected: stages.0.blocks.3.norm1.weight",
    ):
        assert line in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in features.state_dict().items())
    weights = of_a_detector(classifier)
    del weights["backbone.outnorm1.bias"]
    with pytest.raises(CheckpointError, match=r"norms for some maps only, missing: outnorm1\.bias$"):
        features.load(weights)
    with pytest.raises(CheckpointError, match=r"missing: model\.stem\.conv1\.weight"):
        backbone(checkpoint=timm.create_model("test_resnet").state_dict())


def test_weights_of_timm(tmp_path: Path) -> None:
    args = BACKBONES["swin_tiny_patch4_window7_224"]
    source = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5, **args).eval()
    features = Features.create("swin_tiny_patch4_window7_224", checkpoint=source.state_dict(), **args)
    for name, value in features.model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    path = tmp_path / "pretrained.pth"
    pico = timm.create_model("vmamba_pico", stem_stride=4)
    torch.save(pico.state_dict(), path)
    features = Features.create(
        "vmamba_pico", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, stem_stride=4
    )
    assert torch.equal(features.model.stem.conv1.weight, pico.stem.conv1.weight)
    incomplete = pico.state_dict()
    del incomplete["stages.2.blocks.0.op.A_log"]
    torch.save(incomplete, path)
    with pytest.raises(CheckpointError, match=r"(?s)vmamba_pico .*stages\.2\.blocks\.0\.op\.A_log"):
        Features.create(
            "vmamba_pico", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, stem_stride=4
        )


def test_other_image_channels(classifier: Any) -> None:
    features = backbone(in_chans=1)
    with pytest.raises(CheckpointError, match=r"shape: model\.stem\.conv1\.weight"):
        features.load(classifier.state_dict())
    report = features.load(classifier.state_dict(), in_chans="convert")
    assert list(report.converted) == ["model.stem.conv1.weight"]
    assert features(IMAGES[:, :1])[0].shape == (2, 8, 19, 34)


def test_models_that_cannot_be_backbones() -> None:
    with pytest.raises(ModelError, match=r"strides \(4, 8, 16, 32\), it has none at \[32\].*stem_stride=4"):
        Features.create("vmamba_pico")
    with pytest.raises(ModelError, match=r"VisionTransformer: .* none at \[4, 8, 32\]"):
        Features.create("test_vit")
    with pytest.raises(ModelError, match=r"hiera_tiny_224: does not work with images of any size"):
        Features.create("hiera_tiny_224", stages=(1, 1, 1, 1))
    with pytest.raises(ModelError, match="expected one of them, got both"):
        backbone(pretrained=True, checkpoint="x.pth")
    with pytest.raises(ModelError, match="depth"):
        Features.create("vmamba_tiny", depth=3)


def test_configuration_is_the_models() -> None:
    features = backbone()
    assert features.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert features.get_submodule(features.pretrained_cfg["first_conv"][0]) is features.model.stem.conv1
    load_weights(features, features.state_dict())
