"""Every variant: counts, sizes, timm's contract where timm's own tests do not look."""

import copy
import inspect
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from packaging.version import Version
from timm.models import load_checkpoint as timm_load_checkpoint
from timm.models import register_model, save_for_hf
from torch import nn

import vmamba
from vmamba.errors import ModelError
from vmamba.models import ALIASES, model_names
from vmamba.models.factory import check_name

TABLE = {  # parameters, GMACs at 224: the design's table
    "vmamba_tiny_s2l5": (30_705_832, 4.858),
    "vmamba_small_s2l15": (50_147_752, 8.716),
    "vmamba_base_s2l15": (88_557_800, 15.359),
    "vmamba_tiny_s1l8": (30_249_064, 4.906),
    "vmamba_small_s1l20": (49_012_840, 8.612),
    "vmamba_base_s1l20": (86_614_504, 15.221),
    "vanilla_vmamba_tiny": (22_893_448, 5.627),
    "vanilla_vmamba_small": (44_417_416, 11.232),
    "vanilla_vmamba_base": (76_254_056, 18.020),
    "vmamba_tiny_v6": (28_991_656, 5.633),
    "vmamba_tiny_v7": (28_256_680, 5.179),
    "vmamba_tiny_v7_shallow": (22_926_376, 4.018),
    "vmamba_tiny_v8": (26_247_592, 4.861),
}
NAMES = model_names()
VARIANTS = [name for name in NAMES if timm.model_entrypoint(name).__module__ == "vmamba.models.vmamba"]


def small(**kwargs) -> vmamba.VMamba:
    return vmamba.VMamba(**{"num_classes": 5, "depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), **kwargs})


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    actual = sum(p.numel() for p in model.parameters())
    variant = ALIASES.get(name, name)
    if variant in TABLE:
        assert actual == TABLE[variant][0]
    limit = {"vmamba_pico": 1_500_000, "vmamba_pico_wide": 2_000_000, "vmamba_nano": 6_000_000}
    assert actual <= limit.get(variant, 200_000_000)


@pytest.mark.parametrize("name", VARIANTS)
def test_default_cfg(name: str) -> None:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    with torch.device("meta"):
        model = timm.create_model(name)
    assert cfg.input_size[-1] // model.feature_info[-1]["reduction"] == cfg.pool_size[0]
    released = "https://github.com/MzeroMiko/VMamba/releases/download/"
    assert cfg.url.startswith(released) if cfg.tag == "authors_in1k" else not cfg.url


@pytest.mark.parametrize("name", NAMES)
def test_unknown_arguments(name: str) -> None:
    with torch.device("meta"), pytest.raises(TypeError):
        timm.create_model(name, not_an_argument=1)


@pytest.mark.parametrize("size", [(32, 32), (33, 61), (64, 32), (47, 95)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"stem": "patch", "downsample": "merge", "mlp_ratio": 0.0, "gate": True}, {"routes": "cascade"}],
    ids=str,
)
def test_any_input_size(size: tuple[int, int], settings: dict) -> None:
    model = small(**settings)
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_features_are_nchw_in_channels_last_memory() -> None:
    model = timm.create_model("vmamba_pico", features_only=True)
    maps = model(torch.randn(2, 3, 64, 96))
    assert model.feature_info.reduction() == [2, 4, 8, 16]
    for feature, channels, stride in zip(
        maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (2, channels, 64 // stride, 96 // stride)
        assert feature.is_contiguous(memory_format=torch.channels_last)


def test_features_of_fewer_stages() -> None:
    model = timm.create_model("vmamba_nano", features_only=True, depths=(1, 2), dims=(8, 16))
    assert [tuple(each.shape) for each in model(torch.randn(1, 3, 32, 48))] == [
        (1, 8, 16, 24),
        (1, 16, 8, 12),
    ]


def test_intermediates_in_both_formats() -> None:
    model = small().eval()
    x = torch.randn(1, 3, 64, 64)
    final, maps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(maps[-1], final)
    last, nhwc = model.forward_intermediates(x, indices=[1, 3], output_fmt="NHWC")
    torch.testing.assert_close(nhwc[0].permute(0, 3, 1, 2), maps[1])
    torch.testing.assert_close(last.permute(0, 3, 1, 2), final)
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_reset_classifier_keeps_device_and_type() -> None:
    model = small().to(torch.bfloat16)
    model.reset_classifier(7)
    assert model.head.fc.weight.dtype == torch.bfloat16
    assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).shape == (1, 7)
    with torch.device("meta"):
        model = small()
    model.reset_classifier(3, "max")
    assert model.head.fc.weight.device.type == "meta"


def test_checkpointing_changes_nothing() -> None:
    model = small(drop_path_rate=0.3).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32)
    for m in (model, other):
        torch.manual_seed(1)
        m(x).square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_each_variant_is_a_function_that_can_be_found() -> None:
    for name in NAMES:
        function = timm.model_entrypoint(name)
        assert function is getattr(sys.modules[function.__module__], name)
        assert f"def {name}(" in inspect.getsource(function)
        assert function.__doc__
    assert {name for name in NAMES if name in TABLE} == set(TABLE)
    with torch.device("meta"):
        for alias, name in ALIASES.items():
            assert timm.create_model(alias).config == timm.create_model(name).config


def test_a_model_knows_its_settings() -> None:
    with torch.device("meta"):
        model = timm.create_model("vanilla_vmamba_tiny", routes=("row", "column"))
        again = vmamba.VMamba(**model.config.arguments())
    assert again.config == model.config
    assert model.config.arguments()["routes"] == ("row", "column")
    assert model.config.ss2d.gate


def test_submodules_are_of_pytorchs_and_timms_types() -> None:
    model = small(gate=True, drop_path_rate=0.1)
    outside = {type(m) for m in model.modules() if not type(m).__module__.startswith("vmamba.")}
    plain = {nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU, nn.SiLU, nn.Identity, nn.Sequential}
    assert all(kind.__module__.startswith(("torch.nn.modules.", "timm.")) for kind in outside)
    assert plain <= outside
    with torch.device("meta"):
        tiny = timm.create_model("vmamba_tiny")
    assert sum(type(m) is nn.Linear for m in tiny.modules()) == 45


@pytest.mark.parametrize("name", ["vmamba_pico", "vmamba_tiny"])
@pytest.mark.parametrize("downsample", ["conv", "merge"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride(name: str, downsample: str, output_stride: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(
            name, features_only=True, output_stride=output_stride, downsample=downsample
        )
        maps = model(torch.empty(1, 3, 128, 96))
        usual = timm.create_model(name, features_only=True, downsample=downsample)
    reductions = [min(r, output_stride) for r in usual.feature_info.reduction()]
    assert model.feature_info.reduction() == reductions
    assert [tuple(f.shape[2:]) for f in maps] == [(128 // r, 96 // r) for r in reductions]
    assert model.state_dict().keys() == usual.state_dict().keys()
    assert all(p.shape == q.shape for p, q in zip(model.parameters(), usual.parameters(), strict=True))


def test_dilations_follow_the_strides_that_are_left_out() -> None:
    model = small(depths=(1, 1, 1, 1), output_stride=8)
    dilations = [(s.downsample.conv.dilation[0], s.blocks[0].op.conv.dilation[0]) for s in model.stages[1:]]
    assert dilations == [(1, 1), (1, 2), (2, 4)]
    with pytest.raises(ValueError, match="output_stride: expected 8, 16 or 32, got 4"):
        small(output_stride=4)


def test_feature_models_checkpoint_and_name_what_does_not_decay() -> None:
    model = timm.create_model("vmamba_pico", features_only=True).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = torch.randn(2, 3, 32, 32)
    for m in (model, other):
        m(x)[-1].square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    assert all(block.grad_checkpointing for stage in other.model.stages for block in stage.blocks)
    names = dict(model.named_parameters())
    assert len(model.no_weight_decay()) == 3 * 8
    assert all(name in names for name in model.no_weight_decay())


def test_drop_path_rises_linearly() -> None:
    model = small(drop_path_rate=0.4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for s in model.stages for block in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_no_weight_decay_is_the_recurrence() -> None:
    model = small()
    names = model.no_weight_decay()
    assert {name.rpartition(".")[2] for name in names} == {"A_log", "D", "dt_bias"}
    assert len(names) == 3 * 5


def test_safetensors_and_hub_round_trip(tmp_path) -> None:
    pytest.importorskip("safetensors")
    model = timm.create_model("vmamba_pico", num_classes=3).eval()
    save_for_hf(model, tmp_path, model_config={"num_classes": 3}, safe_serialization=True)
    x = torch.randn(1, 3, 32, 32)
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 3}
    loaded = timm.create_model(
        "vmamba_pico", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3
    ).eval()
    torch.testing.assert_close(loaded(x), model(x))
    if Version(timm.__version__) >= Version("1.0.31"):  # earlier ones unpickle a local folder's safetensors
        loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(loaded(x), model(x))
    other = timm.create_model("vmamba_pico", num_classes=3).eval()
    timm_load_checkpoint(other, str(tmp_path / "model.safetensors"))
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stem": "swin"}, "stem: expected one of 'conv', 'patch'"),
        ({"downsample": "pool"}, "downsample: expected"),
        ({"depths": (1, 1)}, "depths, dims: expected as many"),
        ({"stem_stride": 3}, "stem_stride: expected 1, 2 or 4"),
        ({"weight_init": "he"}, "weight_init: expected one of 'normal', 'lecun', got 'he'"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


@pytest.mark.parametrize("weight_init", ["normal", "lecun"])
def test_how_linear_layers_begin(weight_init: str) -> None:
    model = small(dims=(64, 64, 64, 64), weight_init=weight_init)
    layers = [layer for layer in model.stages.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 5 * 4
    for layer in layers:
        expected = 0.02 if weight_init == "normal" else layer.in_features**-0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.05)
        assert layer.bias is None or not layer.bias.any()
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("settings", [{"d_state": 4, "gate": True}, {"routes": "cascade"}], ids=str)
def test_compiled_traced_and_under_autocast_as_eager(settings: dict) -> None:
    model = small(depths=(1,), dims=(8,), **settings).eval()
    x = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-4, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x)
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize(
    "settings",
    [{"gate": True}, {}, {"routes": "cascade"}, {"stem": "patch", "downsample": "merge", "mlp_ratio": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scripted_as_eager(settings: dict, dtype: torch.dtype) -> None:
    model = small(**settings).eval().to(dtype)
    x = torch.randn(2, 3, 40, 56, dtype=dtype)
    tolerance = {"rtol": 0.05, "atol": 0.01} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), **tolerance)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(16, bias=False), nn.RMSNorm(16)], ids=str)
def test_scripted_with_another_out_norm(norm: nn.Module) -> None:
    model = small(depths=(1,), dims=(8,)).eval()
    model.stages[0].blocks[0].op.out_norm = norm
    x = torch.randn(2, 3, 40, 56)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_traced_and_pickled_as_eager() -> None:
    model = small(gate=True).eval()
    x = torch.randn(2, 3, 40, 56)
    expected = model(x)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"stem": "patch", "downsample": "merge", "mlp_ratio": 0.0, "gate": True, "d_state": 2}],
    ids=str,
)
def test_exported_with_dynamic_batch_height_and_width(settings: dict) -> None:
    model = small(depths=(1, 1), dims=(8, 16), **settings).eval()
    dynamic = torch.export.Dim.DYNAMIC
    exported = torch.export.export(
        model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
    )
    targets = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not any("vmamba" in target for target in targets)
    for size in ((1, 3, 64, 64), (2, 3, 33, 97), (3, 3, 128, 40)):
        x = torch.randn(size)
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_meta_device_gives_shapes() -> None:
    with torch.device("meta"):
        model = timm.create_model("vmamba_base")
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert isinstance(model.get_classifier(), nn.Linear)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model that a file of `models/peers/` registers."""
    registry = timm.models._registry
    for name in ("_model_entrypoints", "_model_to_module"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    module = ModuleType("vmamba.models.peers.tiny")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def tiny_peer(pretrained: bool = False, **kwargs) -> vmamba.VMamba:
        return timm.create_model("vmamba_pico", pretrained, **({"dims": (8, 16, 24, 32)} | kwargs))

    tiny_peer.__module__ = module.__name__
    register_model(tiny_peer)
    return "tiny_peer"


def test_a_model_of_another_family_is_ours_too(peer: str, tmp_path: Path) -> None:
    assert peer in model_names()
    with pytest.raises(ModelError, match="did you mean tiny_peer"):
        check_name("tiny_pear")
    model = timm.create_model(peer, num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    predictor = vmamba.load(tmp_path / "weights.pth", device="cpu")
    x = torch.randn(3, 32, 32)
    expected = model(x[None])[0].softmax(0).max().item()
    assert predictor(x).classes[0].score == pytest.approx(expected, rel=1e-4)
