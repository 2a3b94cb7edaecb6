from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vmamba.analysis.complexity import (
    Complexity,
    ModuleComplexity,
    count,
    count_modules,
    feature_shapes,
    gradient_memory,
    parse_size,
)
from vmamba.errors import ModelError
from vmamba.models.factory import create_on_meta
from vmamba.ops.flops import FVCORE_HANDLES

AT_SIZE = {384: 14.27, 512: 25.38, 640: 39.65, 768: 57.09, 1024: 101.50}  # vmamba_tiny


@pytest.mark.parametrize("size", AT_SIZE)
def test_gmacs_of_tiny_at_larger_sizes(size: int) -> None:
    counts = count(create_on_meta("vmamba_tiny"), (3, size, size))
    assert counts.parameters == 30_705_832
    assert counts.macs / 1e9 == pytest.approx(AT_SIZE[size], rel=1e-3)


def test_the_for_loop_counting_is_the_papers_v0() -> None:
    assert count(create_on_meta("vanilla_vmamba_tiny"), (3, 224, 224)).macs_for_loop / 1e9 == pytest.approx(
        4.46, abs=5e-3
    )


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("resnet50", 4.11),
        ("convnext_tiny", 4.46),
        ("deit_small_patch16_224", 4.61),
        ("swin_tiny_patch4_window7_224", 4.51),
        ("cait_xxs24_224", 2.53),  # hands parameters to its modules
    ],
)
def test_other_models_have_their_known_figures(name: str, gmacs: float) -> None:
    counts = count(create_on_meta(name), (3, 224, 224))
    assert counts.macs / 1e9 == pytest.approx(gmacs, rel=1e-2)
    assert counts.parameters == sum(p.numel() for p in timm.create_model(name).parameters())


def test_a_count_leaves_the_model_as_it_was() -> None:
    model = timm.create_model("vmamba_pico", num_classes=2)
    on_meta = count(create_on_meta("vmamba_pico", num_classes=2), (3, 33, 65))
    assert model.training
    assert count(model, (3, 33, 65)) == on_meta
    in_half = count(model.half(), (3, 33, 65))
    assert on_meta.peak_memory / 2 < in_half.peak_memory < on_meta.peak_memory  # y of a scan is in float32
    assert replace(in_half, peak_memory=on_meta.peak_memory) == on_meta
    assert model.training
    assert not any(p.is_meta for p in model.parameters())
    assert torch.is_grad_enabled()


class Twice(nn.Module):
    """A layer that runs twice, one that never runs, and a list, which is no step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](self.layers[0](x)).flatten(1)


def test_counts_of_each_module() -> None:
    tree = count_modules(Twice(), (4, 5, 4))
    layers, unused = tree.children
    (linear,) = layers.children
    size = 4 * 4 * 5 * 4  # bytes of the image, and of each result
    assert linear == ModuleComplexity("0", "Linear", Complexity(20, 640, 640, 640, 160, 3 * size), ())
    assert (layers.kind, layers.counts) == ("ModuleList", linear.counts)
    assert unused.counts == Complexity(20, 0, 0, 0, 0, 0)
    assert tree.counts == replace(linear.counts, parameters=40)


def nodes(tree: ModuleComplexity) -> Iterator[ModuleComplexity]:
    yield tree
    for child in tree.children:
        yield from nodes(child)


@pytest.mark.parametrize("name", ["vmamba_pico", "vanilla_vmamba_tiny", "test_convnext", "test_vit"])
def test_a_module_counts_what_its_children_do(name: str) -> None:
    tree = count_modules(create_on_meta(name), (3, 64, 64) if "vmamba" in name else (3, 160, 160))
    for node in nodes(tree):
        inside = [child.counts for child in node.children]
        for field in ("macs", "macs_for_loop", "macs_torch", "activations"):
            assert getattr(node.counts, field) >= sum(getattr(counts, field) for counts in inside)
        assert node.counts.peak_memory >= max((counts.peak_memory for counts in inside), default=0)
        assert node.counts.macs >= node.counts.macs_for_loop >= node.counts.macs_torch
    blocks = [node for node in nodes(tree) if node.kind == "VSSBlock"]
    for block in blocks:
        assert (
            block.counts.macs
            > block.counts.macs_for_loop
            > sum(child.counts.macs for child in block.children) / 2
        )


def test_the_peak_of_memory() -> None:
    """Of a chain, the input and the output of its largest layer; views and results in place take none."""
    chain = nn.Sequential(nn.Flatten(), nn.Linear(12, 100), nn.ReLU(inplace=True), nn.Linear(100, 3))
    assert count(chain, (3, 2, 2)).peak_memory == 4 * (12 + 100 + 3)
    chain[2] = nn.ReLU()
    assert count(chain, (3, 2, 2)).peak_memory == 4 * (12 + 100 + 100)


def test_the_peak_of_memory_until_the_gradient() -> None:
    """Each layer keeps a map of 12 values: the result of the sigmoid, the input of the next product."""
    chains = [
        nn.Sequential(nn.Flatten(), *(nn.Sequential(nn.Linear(12, 12), nn.Sigmoid()) for _ in range(depth)))
        for depth in (4, 5)
    ]
    less, more = (gradient_memory(chain, (3, 2, 2)) for chain in chains)
    assert more - less == 4 * 12
    assert count(chains[0], (3, 2, 2)).peak_memory == count(chains[1], (3, 2, 2)).peak_memory < less


@pytest.mark.parametrize("name", ["vmamba_pico", "vanilla_vmamba_tiny", "convnext_atto"])
def test_pytorchs_counter_gives_the_same(name: str) -> None:
    """Of a run on a CPU; of transformers it does not, for lack of a formula for attention fused there."""
    model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    assert count(model, (3, 224, 224)).macs_torch == counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["vmamba_pico", "vanilla_vmamba_tiny", "convnext_atto"])
def test_fvcore_gives_the_same(name: str) -> None:
    fvcore: Any = pytest.importorskip("fvcore.nn")
    model, image = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    counts = count(model, (3, 64, 64))
    macs = fvcore.FlopCountAnalysis(model, image).set_op_handle(**FVCORE_HANDLES)
    values = fvcore.ActivationCountAnalysis(model, image)
    for analysis in (macs, values):
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert macs.total() == counts.macs
    assert values.total() == counts.activations


def test_feature_shapes() -> None:
    assert feature_shapes(create_on_meta("vmamba_pico"), (3, 33, 65)) == {
        "stages.0": (24, 17, 33),
        "stages.1": (48, 9, 17),
        "stages.2": (96, 5, 9),
        "stages.3": (192, 3, 5),
    }


def test_models_made_for_one_size_take_another() -> None:
    name = "swin_tiny_patch4_window7_224"
    twice = count(create_on_meta(name, (224, 448)), (3, 224, 448)).macs
    assert twice / 1e9 == pytest.approx(2 * 4.51, rel=1e-3)
    with pytest.raises(ModelError, match=r"does not take an input of \(3, 224, 448\): .*448.*224"):
        count(create_on_meta(name), (3, 224, 448))


def test_sizes() -> None:
    assert parse_size("384") == (384, 384)
    assert parse_size("512x2048") == (512, 2048)
    for text in ("", "a", "0", "1x2x3", "-4", "3.5"):
        with pytest.raises(ModelError, match="expected 384 or 512x2048"):
            parse_size(text)
    with pytest.raises(ModelError, match="unknown model 'vmamba_huge'"):
        create_on_meta("vmamba_huge")
    with pytest.raises(ModelError, match=r"does not take an input of \(4, 32, 32\)"):
        count(create_on_meta("vmamba_pico"), (4, 32, 32))
    with pytest.raises(ModelError, match="does not take an input"):
        count(create_on_meta("vmamba_pico"), (3, 10**9, 10**9))
