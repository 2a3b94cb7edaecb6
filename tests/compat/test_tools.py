"""Tools of others on our models, each beside a timm model that it is known to work on.

They come with the extra `compat`; run with -m compat.
"""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vmamba

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("default")]

SCAN_AND_PROJECTION = 0.42e9
"""Multiply-adds of VMamba-T's scans and of x_proj, a bare parameter: counters of modules see neither."""
PEERS = ["vmamba_pico", "convnext_atto"]
peers = pytest.mark.parametrize("name", PEERS)


def build(name: str, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **kwargs).eval()


DECODERS = [
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus",
    "UPerNet", "Segformer", "DPT",
]  # fmt: skip


@pytest.mark.parametrize("encoder", ["vmamba_tiny", "convnext_atto"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_of_segmentation_models(decoder: str, encoder: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    height, width = (128, 192) if decoder == "PAN" else (64, 96)  # PAN pools its deepest map three times
    x = torch.randn(2, 3, height, width)
    model = getattr(smp, decoder)(f"tu-{encoder}", encoder_weights=None, classes=2)
    y = model.train()(x)
    assert y.shape == (2, 2, height, width)
    y.mean().backward()
    unused = [n for n, p in model.encoder.named_parameters() if p.grad is None and ".head." not in n]
    assert not [n for n in unused if "stages.0" in n]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vmamba_pico", "stages.3.blocks.0.op.out_norm"),
        ("vmamba_pico", "stages.3.blocks"),
        ("vmamba_pico", "stages.3.blocks.0.mlp.act"),
        ("convnext_atto", "stages.3.blocks.1"),
    ],
)
def test_grad_cam(name: str, layer: str) -> None:
    cam = pytest.importorskip("pytorch_grad_cam")
    model = build(name)

    def to_nchw(t: Tensor) -> Tensor:
        return t if name == "convnext_atto" else t.permute(0, 3, 1, 2)

    x = torch.randn(1, 3, 64, 64)
    with cam.GradCAM(model, [model.get_submodule(layer)], reshape_transform=to_nchw) as explain:
        heat = explain(x, targets=None)
    assert heat.shape == (1, 64, 64)
    activation, gradient = recorded(model, layer, x)
    weights = gradient.mean((2, 3), keepdim=True) if name == "convnext_atto" else gradient.mean((1, 2))
    expected = (weights * activation).sum(1 if name == "convnext_atto" else -1).relu()
    assert (heat.max() > 0) == bool(expected.max() > 0)


def recorded(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output of a layer, and the gradient of the largest logit with respect to it."""
    outputs: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, output: outputs.append(output))
    logits = model(x)
    handle.remove()
    return outputs[0].detach(), torch.autograd.grad(logits.max(), outputs[0])[0]


@peers
def test_guided_backpropagation(name: str) -> None:
    """captum's hooks on every activation, against the same rule written down here."""
    attr = pytest.importorskip("captum.attr")
    model = build(name)
    for path, module in list(model.named_modules()):
        if isinstance(module, (nn.GELU, nn.SiLU)):  # the rule is one of ReLU
            owner, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.ReLU())
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    actual = attr.GuidedBackprop(copy.deepcopy(model)).attribute(x, target=1)

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            ctx.save_for_backward(t)
            return t.relu()

        @staticmethod
        def backward(ctx, grad):
            return grad.relu() * (ctx.saved_tensors[0] > 0)

    class GuidedReLU(nn.Module):
        def forward(self, t):
            return Guided.apply(t)

    for path, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):
            owner, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner), attribute, GuidedReLU())
    (expected,) = torch.autograd.grad(model(x)[0, 1], x)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "targets"), [("vmamba_pico", "fc1|out_proj"), ("vit_tiny_patch16_224", "fc1|fc2")]
)
def test_lora(name: str, targets: str) -> None:
    peft = pytest.importorskip("peft")
    # Not a ConvNeXt: its layer scale of 1e-6 would hide what the blocks learn.
    model = build(name, **({"img_size": 64} if name.startswith("vit") else {}))
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=rf".*\.({targets})", r=2))
    torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-5)
    adapted(x).square().sum().backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None for p in trained.values())
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1)
        changed = adapted(x)
        assert not torch.allclose(changed, expected, atol=1e-3)
        torch.testing.assert_close(adapted.merge_and_unload()(x), changed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("vmamba_pico", r".*(out_norm|norm1|norm2)"), ("convnext_atto", r".*blocks\.\d+\.norm")],
)
def test_tuning_of_norms(name: str, targets: str) -> None:
    peft = pytest.importorskip("peft")
    model, x = build(name), torch.randn(2, 3, 64, 64)
    expected = model(x).detach()
    adapted = peft.get_peft_model(model, peft.LNTuningConfig(target_modules=targets))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-5)
    adapted(x).square().sum().backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize(("name", "expected"), [("vmamba_tiny", 4.4e9), ("convnext_tiny", 4.45e9)])
def test_thop(name: str, expected: float) -> None:
    thop = pytest.importorskip("thop")
    macs, _ = thop.profile(timm.create_model(name), (torch.randn(1, 3, 224, 224),), verbose=False)
    assert macs == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("name", "expected"), [("vmamba_tiny", 4.5e9), ("convnext_tiny", 4.45e9)])
def test_ptflops(name: str, expected: float) -> None:
    ptflops = pytest.importorskip("ptflops")
    macs, _ = ptflops.get_model_complexity_info(
        timm.create_model(name), (3, 224, 224), as_strings=False, print_per_layer_stat=False, verbose=False
    )
    assert macs == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("name", "expected"), [("vmamba_tiny", 4.59e9), ("convnext_tiny", 4.46e9)])
def test_fvcore(name: str, expected: float) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    model = timm.create_model(name).eval()
    counts = fvcore.FlopCountAnalysis(model, torch.randn(1, 3, 224, 224))
    counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert counts.total() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("name", "expected"), [("vmamba_tiny", 4.65e9), ("convnext_tiny", 4.45e9)])
def test_flop_counter(name: str, expected: float) -> None:
    model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("name", "layers"), [("vmamba_tiny", 45), ("convnext_tiny", 37)])
def test_dynamic_quantization(name: str, layers: int) -> None:
    model, x = timm.create_model(name).eval(), torch.randn(1, 3, 64, 64)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    kinds = [type(m) for m in quantized.modules()]
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == layers
    assert nn.Linear not in kinds
    with torch.no_grad():
        # Not each logit: without VNNI instructions PyTorch's int8 products saturate.
        assert F.cosine_similarity(quantized(x), model(x)).item() > 0.95


@peers
def test_torchao(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, x = build(name), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        quantized = copy.deepcopy(model)
        quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
        assert not any(type(m.weight) is nn.Parameter for m in quantized.modules() if type(m) is nn.Linear)
        assert (quantized(x) - expected).abs().max() < 0.2 * expected.abs().max()


def test_a_lora_adapter_in_an_ssm() -> None:
    """An adapter of a projection is called, whichever path the rest of its layer takes."""
    peft = pytest.importorskip("peft")
    model = vmamba.VMamba(num_classes=3, depths=(1,), dims=(8,), gate=True).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        config = peft.LoraConfig(target_modules=["in_proj"], r=2, init_lora_weights=False)
        assert not torch.allclose(peft.get_peft_model(model, config)(x), expected, atol=1e-5)
