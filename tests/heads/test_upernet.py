"""UPerNet: mmseg's numbers, names and losses."""

import collections
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from authors import authors_names
from vmamba.errors import CheckpointError, ModelError
from vmamba.heads import Features, UPerNet, upernet
from vmamba.heads.upernet import cross_entropy, mmseg_names
from vmamba.models.weights import load_weights

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import parity

DATA = Path(__file__).parents[1] / "data"
SMALL: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 16, 32, 64)}
IMAGES = torch.randn(2, 3, 70, 101, generator=torch.Generator().manual_seed(1))


def small(num_classes: int = 5, **changes: Any) -> UPerNet:
    return upernet("vmamba_tiny", num_classes, channels=16, aux_channels=8, **{**SMALL, **changes})


@pytest.fixture
def model() -> UPerNet:
    torch.manual_seed(3)
    made = small()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name, buffer in made.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return made.eval()


def of_mmseg(model: UPerNet) -> dict[str, Tensor]:
    """The weights as the authors' code saves them: its own names in the backbone, mmseg's in the heads."""
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith("backbone.model."):
            inside = authors_names({name.removeprefix("backbone.model."): value})
            weights |= {f"backbone.{theirs}": weight for theirs, weight in inside.items()}
        else:
            weights[name] = value
    return weights


def test_the_numbers_are_mmsegs(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.check(DATA / "upernet_micro.safetensors"), capsys.readouterr().out
    assert "not checked" not in capsys.readouterr().out


def test_evaluation_gives_logits_of_every_pixel(model: UPerNet) -> None:
    with torch.no_grad():
        logits = model(IMAGES)
        coarse = model.decode_head(model.backbone(IMAGES))
    assert coarse.shape == (2, 5, 18, 26)
    expected = nn.functional.interpolate(coarse, (70, 101), mode="bilinear", align_corners=False)
    assert torch.equal(logits, expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(IMAGES).dtype == torch.float32
    assert model.double()(IMAGES.double()).dtype == torch.float64


def test_training_gives_the_losses() -> None:
    torch.manual_seed(0)
    model = small(drop_path_rate=0.1)
    labels = torch.randint(0, 5, (2, 70, 101))
    labels[:, :20] = 255
    losses = model(IMAGES, labels)
    assert sorted(losses) == ["aux.loss_ce", "decode.loss_ce"]
    sum(losses.values()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # Nothing is learnt yet: every class is as likely, and ignored pixels count in the divisor alone.
    expected = torch.tensor(5.0).log() * 50 / 70
    assert losses["decode.loss_ce"].item() == pytest.approx(expected.item(), rel=0.05)
    assert losses["aux.loss_ce"].item() == pytest.approx(0.4 * expected.item(), rel=0.05)


def test_the_mean_is_over_ignored_pixels_too() -> None:
    logits = torch.tensor([[[[1.0, 0.0, 3.0]], [[0.0, 2.0, -1.0]]]])
    labels = torch.tensor([[[0, 1, 255]]])
    expected = ((1 + torch.tensor(-1.0).exp()).log() + (1 + torch.tensor(-2.0).exp()).log()) / 3
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
    assert cross_entropy(logits, torch.full((1, 1, 3), 255)).item() == 0


def test_wrong_calls() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"labels: expected \(2, 70, 101\), got \(2, 1, 70, 101\)"):
        model(IMAGES, torch.zeros(2, 1, 70, 101, dtype=torch.long))
    one = IMAGES[:1], torch.zeros(1, 70, 101, dtype=torch.long)
    with pytest.raises(ValueError, match="BatchNorm trains on at least two"):
        model(*one)
    model.decode_head.psp_modules.eval()
    assert model(*one)
    with pytest.raises(TypeError, match="made already and takes no drop_path_rate"):
        upernet(model.backbone, 3, drop_path_rate=0.1)
    with pytest.raises(ModelError, match="unknown model 'vmamba_huge'"):
        upernet("vmamba_huge")


def test_any_backbone() -> None:
    args = {"depths": (1, 2, 1, 2), "embed_dim": 8, "num_heads": (1, 1, 2, 2)}
    backbone = Features.create("swin_tiny_patch4_window7_224", **args)
    model = upernet(backbone, 3, channels=8, aux_channels=8).eval()
    assert model(IMAGES).shape == (2, 3, 70, 101)
    assert model.num_classes == 3
    copied = upernet("swin_tiny_patch4_window7_224", 3, channels=8, aux_channels=8, **args).eval()
    load_weights(copied, mmseg_names(model.state_dict()))
    assert torch.equal(copied(IMAGES), model(IMAGES))


def test_gradient_checkpointing_reaches_the_backbone() -> None:
    model = small()
    model.set_grad_checkpointing()
    assert all(block.grad_checkpointing for stage in model.backbone.model.stages for block in stage.blocks)


@pytest.fixture
def history_buffer(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles as mmengine's does, gone once the test undoes `monkeypatch`."""

    class HistoryBuffer:
        def __init__(self) -> None:
            import numpy as np

            self._log_history = np.array([1.0, 2.0])
            self._statistics_methods = {"mean": HistoryBuffer.mean, "last": np.float64(3)}

        def mean(self) -> float:
            return 0.0

    for item, name in ((HistoryBuffer, "HistoryBuffer"), (HistoryBuffer.mean, "HistoryBuffer.mean")):
        item.__module__, item.__qualname__ = "mmengine.logging.history_buffer", name
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = HistoryBuffer
    return HistoryBuffer


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_mmseg(
    prefix: str, model: UPerNet, history_buffer: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "iter_160000.pth"
    weights = collections.OrderedDict((prefix + name, value) for name, value in of_mmseg(model).items())
    hub = {"log_scalars": {"train/loss": history_buffer()}, "runtime_info": {"iter": 160000}}
    torch.save({"meta": {"iter": 160000}, "state_dict": weights, "message_hub": hub}, path)
    monkeypatch.undo()
    loaded = small().eval()
    report = load_weights(loaded, path)
    assert len(report.loaded) == len(model.state_dict())
    assert not report.missing
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    backbone = Features.create("vmamba_tiny", checkpoint=path, **SMALL).eval()
    assert all(torch.equal(a, b) for a, b in zip(backbone(IMAGES), model.backbone(IMAGES), strict=True))


def test_names_are_turned_back(model: UPerNet) -> None:
    theirs, expected = mmseg_names(model.state_dict()), of_mmseg(model)
    assert set(theirs) == set(expected)
    assert all(torch.equal(theirs[name], value) for name, value in expected.items())
    heads = {name for name in theirs if not name.startswith("backbone.")}
    file = {name for name in load_file(DATA / "upernet_micro.safetensors") if name.startswith("param.")}
    assert {f"param.{name}" for name in heads} == file


def test_weights_that_do_not_fit_are_named(model: UPerNet) -> None:
    weights = of_mmseg(model)
    del weights["backbone.outnorm3.weight"], weights["decode_head.bottleneck.bn.running_mean"]
    weights["auxiliary_head.convs.1.conv.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        load_weights(small(), weights)
    for problem in (
        "missing: backbone.outnorm3.weight (64,)",
        "missing: decode_head.bottleneck.bn.running_mean (16,)",
        "unexpected: auxiliary_head.convs.1.conv.weight",
    ):
        assert problem in str(error.value)
    assert "3 problems" in str(error.value)


def test_other_classes_keep_their_own_classifiers(model: UPerNet) -> None:
    loaded = small(num_classes=3).eval()
    with pytest.raises(CheckpointError, match=r"shape: decode_head\.conv_seg\.weight"):
        load_weights(loaded, of_mmseg(model))
    before = loaded.decode_head.conv_seg.weight.clone()
    report = load_weights(loaded, of_mmseg(model), classifier="new")
    assert sorted(report.missing) == [
        f"{head}.conv_seg.{kind}" for head in ("auxiliary_head", "decode_head") for kind in ("bias", "weight")
    ]
    assert torch.equal(loaded.decode_head.conv_seg.weight, before)
    assert torch.equal(loaded.decode_head.bottleneck.conv.weight, model.decode_head.bottleneck.conv.weight)
