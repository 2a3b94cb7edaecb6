"""The tool that compares with other code's numbers: any sizes, and every way to fail."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vmamba
from vmamba.models.official import authors_names

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import parity

DATA = Path(__file__).parents[1] / "data"
FILES = ("v2_micro", "vanilla_micro", "mask_rcnn_micro", "upernet_micro")


@pytest.mark.parametrize("name", FILES)
def test_a_file_within_its_tolerances(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = DATA / f"{name}.safetensors"
    assert parity.main([str(path)]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert "not checked" not in printed
    assert "BEYOND" not in printed


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("v2_micro", "logits"),
        ("v2_micro", "stage.2"),
        ("v2_micro", "grad.layers.2.blocks.1.op.Ds"),
        ("mask_rcnn_micro", "fpn.1"),
        ("mask_rcnn_micro", "proposals"),
        ("mask_rcnn_micro", "boxes"),
        ("mask_rcnn_micro", "scores"),
        ("mask_rcnn_micro", "labels"),
        ("mask_rcnn_micro", "masks"),
        ("mask_rcnn_micro", "train.mask_targets"),
        ("upernet_micro", "param.decode_head.conv_seg.weight"),
        ("upernet_micro", "logits"),
        ("upernet_micro", "aux_logits"),
        ("upernet_micro", "loss"),
        ("upernet_micro", "aux_loss"),
    ],
)
@pytest.mark.parametrize("kind", ["changed", "not a number"])
def test_a_wrong_number(
    name: str, key: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(DATA / f"{name}.safetensors")
    value = tensors[key].flatten()
    place = min(3, len(value) - 1)
    if kind == "changed":
        value[place] = value[place] + 1 if value.is_floating_point() else 1 - value[place].clamp(max=1)
    elif value.is_floating_point():
        value[place] = float("nan")
    else:
        pytest.skip("an integer")
    tensors[key] = value.reshape(tensors[key].shape)
    save_file(tensors, path := tmp_path / "changed.safetensors")
    assert parity.main([str(path)]) == 1
    assert "BEYOND" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        {"depths": (1, 2), "dims": (4, 12), "num_classes": 3, "ssm_ratio": 1.0, "in_chans": 1},
        {"depths": (1, 1, 1), "dims": (8, 8, 8), "d_state": 3, "dt_rank": 2, "ssm_conv": 0, "gate": True},
        {"depths": (2,), "dims": (32,), "mlp_ratio": 2.0, "stem": "patch", "downsample": "merge"},
    ],
)
def test_settings_are_read_from_the_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    model = vmamba.VMamba(**settings)
    images = torch.randn(1, settings.get("in_chans", 3), 64, 64)
    stages = model.forward_intermediates(images, intermediates_only=True)
    tensors = {f"param.{name}": value for name, value in authors_names(model.state_dict()).items()}
    tensors |= {f"stage.{i}": stage for i, stage in enumerate(stages)}
    tensors |= {"input": images, "logits": model(images)}
    contents = {key: value.detach().clone().contiguous() for key, value in tensors.items()}
    save_file(contents, path := tmp_path / "other.safetensors")
    assert parity.main([str(path)]) == 0


def test_what_is_no_such_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x": torch.ones(1)}, other := tmp_path / "other.safetensors")
    (damaged := tmp_path / "damaged.safetensors").write_bytes(b"123")
    good = DATA / "upernet_micro.safetensors"
    assert parity.main([str(other), str(damaged), str(tmp_path / "none"), str(good)]) == 1
    printed = capsys.readouterr()
    assert "other.safetensors: of no known kind" in printed.err
    assert "damaged.safetensors: cannot be read" in printed.err
    assert "none: cannot be read" in printed.err
    assert "upernet_micro.safetensors (UPerNet)" in printed.out
