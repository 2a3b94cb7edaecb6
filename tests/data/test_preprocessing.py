import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from torch import nn

import vmamba  # noqa: F401  (registers the models)
from vmamba.data import Preprocessing

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
NAMES = ["vmamba_tiny", "vmamba_pico", "resnet50", "beit_base_patch16_224", "test_vit", "fastvit_t8"]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_sees_what_timm_shows_it(name: str) -> None:
    cfg: Any = timm.get_pretrained_cfg(name)
    preprocessing = Preprocessing.of_model(cfg)
    expected = create_transform(**resolve_data_config(pretrained_cfg=cfg.to_dict()), is_training=False)
    assert torch.equal(preprocessing.transform()(preprocessing.convert(IMAGE)), expected(IMAGE))
    assert Preprocessing.of_model(cfg.to_dict()) == preprocessing
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing
    again = resolve_data_config(pretrained_cfg=preprocessing.to_pretrained_cfg())
    assert again == {key: again[key] for key in resolve_data_config(pretrained_cfg=cfg.to_dict())}
    assert again == resolve_data_config(pretrained_cfg=cfg.to_dict())


def test_every_configuration_of_timm_is_understood() -> None:
    for name in timm.list_models():
        cfg = timm.get_pretrained_cfg(name)
        if cfg is not None:
            Preprocessing.of_model(cfg)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_the_transform_is_timms_at_any_size(size: tuple[int, int], crop_mode: str) -> None:
    preprocessing = Preprocessing(size=size, crop_mode=crop_mode, crop_pct=0.8, interpolation="bilinear")
    expected = create_transform(
        (3, *size), crop_mode=crop_mode, crop_pct=0.8, interpolation="bilinear", is_training=False
    )
    shown = preprocessing.transform()(IMAGE)
    assert shown.shape == (3, *size)
    assert torch.equal(shown, expected(IMAGE))


def test_a_model_gives_its_channels() -> None:
    for channels in (1, 3, 4):
        model = timm.create_model("vmamba_pico", in_chans=channels)
        assert Preprocessing.of_model(model).channels == channels
    model = timm.create_model("vmamba_pico")
    config = resolve_model_data_config(model)
    assert Preprocessing.of_model(model).size == config["input_size"][1:]
    assert Preprocessing.of_model(nn.Identity()) == Preprocessing()
    with pytest.raises(TypeError, match="expected a model or a pretrained configuration, got list"):
        Preprocessing.of_model([])


def test_mean_and_std_follow_the_channels() -> None:
    cfg = {"mean": (0.1, 0.2, 0.6), "std": (0.5, 0.25, 0.75)}
    one = Preprocessing.of_model(cfg, channels=1)
    assert (one.mean, one.std) == (pytest.approx((0.3,)), (0.5,))
    assert Preprocessing.of_model(cfg, channels=5).mean == (0.1, 0.2, 0.6, 0.1, 0.2)
    assert Preprocessing.of_model(cfg, channels=4, mean=(0.5,)).mean == (0.5,) * 4
    assert Preprocessing.of_model(cfg, mean=None).mean == (0.1, 0.2, 0.6)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("size", [(16, 16), (16, 24)])
def test_tensors_of_any_channels_are_cropped_and_normed(channels: int, size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(channels, size, mean=(0.25,), std=(0.5,), float_images=True)
    shown = preprocessing.transform()(torch.full((channels, 40, 50), 0.75))
    torch.testing.assert_close(shown, torch.ones(channels, *size))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 0}, "channels: expected at least 1"),
        ({"size": (0, 5)}, "size: expected height and width"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values for 3 channels"),
        ({"std": (1.0, 1.0, 0.0)}, "std .* is not above 0"),
        ({"interpolation": "random"}, "interpolation: expected one of nearest, .*got 'random'"),
        ({"crop_mode": "middle"}, "crop_mode: expected one of center, .*got 'middle'"),
        ({"crop_pct": 87.5}, "crop_pct: expected more than 0 and at most 2, got 87.5"),
        ({"background": (0, 0, 256)}, "background: expected three values from 0 to 255"),
        ({"value_range": (1.0, 1.0)}, "value_range .*not below"),
        ({"channels": 4, "mean": (0.5,), "std": (0.5,), "crop_mode": "border"}, "crop_mode 'border'"),
    ],
)
def test_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**changes)
    with pytest.raises(ValueError, match="unknown colour"):
        Preprocessing.from_dict({"colour": 1})
