from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from dense_models import detector, segmenter
from vmamba.analysis import memory
from vmamba.analysis.attention import scan_attention
from vmamba.analysis.backbones import backbone, read_input, shown
from vmamba.analysis.receptive_field import receptive_field
from vmamba.data.preprocessing import Preprocessing
from vmamba.errors import DataError, ModelError

SIZE = (3, 64, 96)


def test_a_classifier_is_its_own() -> None:
    model = timm.create_model("test_convnext")
    assert backbone(model, SIZE) is model
    assert backbone(nn.Sequential(model), SIZE) is model


@pytest.mark.parametrize("build", [detector, segmenter])
def test_of_a_detector_and_of_a_segmenter(build) -> None:
    network = backbone(build(), SIZE, gradient=True)
    image = torch.randn(SIZE)
    assert scan_attention(network, image, stage=0, block=0).size == (16, 24)
    assert receptive_field(network, [image]).shape == SIZE[1:]


def test_models_that_are_made_for_one_size() -> None:
    model = timm.create_model("deit_tiny_patch16_224")
    with pytest.raises(AssertionError):
        model(torch.randn(1, *SIZE))
    assert receptive_field(backbone(model, SIZE), [torch.randn(SIZE)]).shape == SIZE[1:]
    model = timm.create_model("deit_tiny_patch16_224")

    def refuse(img_size: tuple[int, int]) -> None:
        raise ValueError("no grid")

    model.set_input_size = refuse
    with pytest.raises(ModelError, match=r"does not take images of \(64, 96\): no grid"):
        backbone(model, SIZE)
    model.set_input_size = None
    with pytest.raises(ModelError, match=r"takes images of 224x224 only, not of \(64, 96\)"):
        backbone(model, SIZE)


def test_swin_is_resized_without_a_word() -> None:
    args = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
    model = timm.create_model("swin_tiny_patch4_window7_224", **args)
    assert receptive_field(backbone(model, SIZE), [torch.randn(SIZE)]).shape == SIZE[1:]


def test_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"with feature maps \(forward_intermediates\), Conv2d has none"):
        backbone(nn.Conv2d(3, 3, 1), SIZE)
    monkeypatch.setattr(memory, "_available_memory", lambda: 2**20)
    with pytest.raises(
        ModelError, match=r"one pass of VMamba over an image of 1024x1024 takes .* GiB are free"
    ):
        backbone(timm.create_model("vmamba_pico"), (3, 1024, 1024))
    monkeypatch.setattr(memory, "_available_memory", lambda: 2**30)
    model = timm.create_model("vmamba_pico")
    assert backbone(model, (3, 1024, 1024)) is model
    with pytest.raises(ModelError, match=r"the gradient of VMamba over an image of 1024x1024 takes"):
        backbone(model, (3, 1024, 1024), gradient=True)


def test_an_image_as_the_model_takes_it(tmp_path: Path) -> None:
    pixels = torch.rand(40, 60, 3).mul(255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    preprocessing = Preprocessing(size=(20, 20), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop_pct=1.0)
    expected = preprocessing.transform()(Image.fromarray(pixels))
    image = read_input(tmp_path / "image.png", preprocessing)
    torch.testing.assert_close(image, expected)
    assert read_input(tmp_path / "image.png", preprocessing, (24, 32)).shape == (3, 24, 32)
    picture = shown(image, preprocessing)
    assert 0 <= picture.min() <= picture.max() <= 1
    torch.testing.assert_close(picture[1], (image[1] * 0.6 + 0.2).clamp(0, 1))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"broken\.png"):
        read_input(tmp_path / "broken.png", preprocessing)
