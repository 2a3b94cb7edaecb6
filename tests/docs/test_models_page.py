"""docs/models.md names every model, with its own number of parameters."""

import re

import timm
import torch

import vmamba
from docs.blocks import ROOT


def rows() -> dict[str, int]:
    """Name → parameters, of the first table."""
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = page.split("## Counted here")[1].split("## Measured here")[0]
    numbers = {}
    for line in re.findall(r"^\| `.*$", table, re.MULTILINE):
        names, parameters = line.split("|")[1:3]
        numbers.update(dict.fromkeys(re.findall(r"`(\w+)`", names), int(parameters.replace(",", ""))))
    return numbers


def test_every_model_with_its_parameters() -> None:
    expected = {}
    for name in timm.list_models(module=vmamba.VMamba.__module__.rsplit(".", 1)[1]):
        with torch.device("meta"):
            expected[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    assert rows() == expected
