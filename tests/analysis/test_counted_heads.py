"""Counts of the paper's Tables 2 and 3: each row is `vmamba info BACKBONE --head HEAD`.

The figures of VMamba and Swin are its authors' (assets/performance_stage1.md of their repository, and their
logs where there are digits behind the point). Those of ConvNeXt, PVTv2 and ViT-Adapter stand in InternImage's
Table 3 (arXiv 2211.05778) too, those of ResNet and DeiT in LocalMamba's Tables 3 and 4 (arXiv 2403.09338).
"""

import json

import pytest
import torch
from typer.testing import CliRunner

from vmamba.analysis.heads import HEADS, count_in_head
from vmamba.errors import ModelError
from vmamba.heads import upernet
from vmamba_cli.__main__ import app

ROUNDED, EXACT = 0.02, 0.005

DETECTION = {
    "resnet50": (44, 260, ROUNDED),
    "resnet101": (63, 336, ROUNDED),
    "swin_tiny_patch4_window7_224": (47.80, 266.6, EXACT),
    "swin_small_patch4_window7_224": (69, 354, ROUNDED),
    "swin_base_patch4_window7_224": (107, 496, ROUNDED),
    "convnext_tiny": (48, 262, ROUNDED),
    "convnext_small": (70, 348, ROUNDED),
    "convnext_base": (108, 486, ROUNDED),
    "pvt_v2_b2": (45, 309, ROUNDED),
    "pvt_v2_b3": (65, 397, ROUNDED),
    "pvt_v2_b5": (102, 557, ROUNDED),
    "vit_adapter_small": (48, 403, ROUNDED),
    "vmamba_tiny": (50.212, 270.19, EXACT),
    "vmamba_small": (69.654, 348.92, EXACT),
    "vmamba_base": (108.0, 485.50, EXACT),
}
"""Table 2, at 800×1280: millions of parameters, GMACs, and how near we come."""

SEGMENTATION = {
    "resnet50": (67, 953, ROUNDED),  # theirs has a stem of three convolutions
    "resnet101": (85, 1030, ROUNDED),
    "deit_small_mln": (58, 1217, ROUNDED),
    "deit_base_mln": (144, 2007, ROUNDED),
    "swin_tiny_patch4_window7_224": (59.94, 945, EXACT),
    "swin_small_patch4_window7_224": (81, 1039, ROUNDED),
    "swin_base_patch4_window7_224": (121, 1188, ROUNDED),
    "convnext_tiny": (60, 939, ROUNDED),
    "convnext_small": (82, 1027, ROUNDED),
    "convnext_base": (122, 1170, ROUNDED),
    "vmamba_tiny": (62.359, 947.78, EXACT),
    "vmamba_small": (81.801, 1028.40, EXACT),
    "vmamba_base": (122.069, 1170.34, EXACT),
}
"""Table 3, at 512×2048."""

QUICK = ("vmamba_tiny", "vit_adapter_small", "deit_small_mln")
ONE_OF_EACH = ("resnet50", "swin_tiny_patch4_window7_224", "convnext_tiny", "pvt_v2_b2")


def rows() -> list[object]:
    def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
        if name in QUICK:
            return ()
        return (pytest.mark.full if name in ONE_OF_EACH else pytest.mark.slow,)

    tables = (("mask_rcnn", DETECTION), ("upernet", SEGMENTATION))
    return [
        pytest.param(head, name, *figures, marks=marks(name))
        for head, table in tables
        for name, figures in table.items()
    ]


@pytest.mark.parametrize(("head", "name", "millions", "giga", "tolerance"), rows())
def test_a_row_of_the_tables(head: str, name: str, millions: float, giga: float, tolerance: float) -> None:
    counts = count_in_head(name, head)
    assert counts.parameters / 1e6 == pytest.approx(millions, rel=tolerance)
    assert counts.macs / 1e9 == pytest.approx(giga, rel=tolerance)


def test_the_norms_are_2880_parameters() -> None:
    with torch.device("meta"):
        plain, normed = (upernet("vmamba_tiny", norm=norm) for norm in (False, True))
    assert sum(p.numel() for p in plain.parameters()) == 62_356_460
    assert sum(p.numel() for p in normed.parameters()) == 62_356_460 + 2880


@pytest.mark.parametrize("head", HEADS)
def test_the_command(head: str) -> None:
    result = CliRunner().invoke(app, ["info", "resnet18", "--head", head, "--input", "64x96", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    counts = count_in_head("resnet18", head, (64, 96))
    assert facts["parameters"] == counts.parameters
    assert facts["GMACs"] == round(counts.macs / 1e9, 3)
    assert facts["input"] == "3 x 64 x 96"


def test_wrong_calls() -> None:
    assert CliRunner().invoke(app, ["info", "--head", "upernet"]).exit_code == 2
    assert CliRunner().invoke(app, ["info", "resnet18", "--head", "unet"]).exit_code == 2
    with pytest.raises(ModelError, match=r"has none at \[32\] .*stem_stride=4"):
        count_in_head("vmamba_pico", "upernet")
