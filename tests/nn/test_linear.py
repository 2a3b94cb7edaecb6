"""The linear layers: what `nn.Linear` and timm's `Mlp` compute, whatever path is taken."""

import copy

import pytest
import torch
from timm.layers import Mlp as TimmMlp
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vmamba.nn import linear as module
from vmamba.nn import parts
from vmamba.nn.linear import Linear, Mlp, linear

onednn = pytest.mark.skipif(not module._ONEDNN, reason="oneDNN is used on x86 alone")
SHAPES = [(5,), (1, 7), (2, 3, 4), (0, 3, 4)]


@pytest.fixture(autouse=True, params=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 by either library, whatever serves this processor better."""
    monkeypatch.setattr(module, "_MKL", request.param == "MKL")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@onednn
def test_the_fast_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda *args: calls.append(args) or product(*args))
    layer, x = Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert len(calls) == 2  # the product and the gradient of x
    with torch.no_grad():
        layer(x)
        Mlp(4, 8)(x)
    assert len(calls) == 5


@pytest.mark.parametrize("lead", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(lead: tuple[int, ...], bias: bool) -> None:
    layer = Linear(6, 5, bias=bias)
    plain = nn.Linear(6, 5, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(*lead, 6, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    y, expected = layer(x), plain(other)
    assert y.shape == expected.shape
    close(y, expected)
    grad = torch.randn(5).expand_as(y)  # as the gradient of a sum comes: without strides
    y.backward(grad)
    expected.backward(grad)
    for found, true in zip([x, *layer.parameters()], [other, *plain.parameters()], strict=True):
        close(found.grad, true.grad)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_alone(wanted: tuple[int, ...]) -> None:
    tensors = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)]
    for i in wanted:
        tensors[i].requires_grad_()
    found = torch.autograd.grad(linear(*tensors).square().sum(), [tensors[i] for i in wanted])
    expected = torch.autograd.grad(F.linear(*tensors).square().sum(), [tensors[i] for i in wanted])
    for gradient, true in zip(found, expected, strict=True):
        close(gradient, true)


def test_second_derivatives() -> None:
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (5, 4), (5,)))
    found = []
    for function in (linear, F.linear):
        first = torch.autograd.grad(function(x, weight, bias).pow(3).sum(), [x, weight], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, weight, bias]))
    for gradient, true in zip(*found, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-4, atol=1e-3)


def test_second_derivatives_of_the_mlp() -> None:
    mlp, x = Mlp(4, 8), torch.randn(3, 4, requires_grad=True)
    theirs = TimmMlp(4, 8)
    theirs.load_state_dict(mlp.state_dict())
    found = []
    for function in (mlp, theirs):
        tensors = [x, *function.parameters()]
        first = torch.autograd.grad(function(x).pow(3).sum(), tensors, create_graph=True)
        found.append(first + torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    for gradient, true in zip(*found, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-4, atol=1e-4)


@onednn
def test_norm_and_product() -> None:
    norm, layer = nn.LayerNorm(4), Linear(4, 3, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 4, requires_grad=True)
    tensors = [x, norm.weight, norm.bias, layer.weight]
    kept, found = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = module.normed_product(x, norm, layer)
    assert kept.count(x.shape) == 1
    for out in (y, layer(norm(x))):
        first = torch.autograd.grad(out.pow(3).sum(), tensors, create_graph=True)
        plain = torch.autograd.grad(out.pow(3).sum(), tensors, retain_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        found.append([out, *first, *plain, *second])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    (only,) = torch.autograd.grad(module.normed_product(x.detach(), norm, layer).sum(), [norm.bias])
    close(only, torch.autograd.grad(layer(norm(x)).sum(), [norm.bias])[0])
    with torch.no_grad():
        assert module.normed_product(x, norm, layer) is None
    assert module.normed_product(x, norm, nn.Identity()) is None


@onednn
def test_the_mlp_keeps_its_hidden_layer_once() -> None:
    mlp, x, kept = Mlp(4, 8), torch.randn(3, 4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        mlp(x)
    assert kept.count((3, 8)) == 1


def test_strided_operands() -> None:
    x, weight = torch.randn(4, 6, 3).transpose(0, 2), torch.randn(4, 5).t()
    close(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("training", [True, False])
def test_weights_are_never_stale(training: bool) -> None:
    mlp, x = Mlp(8, 16), torch.randn(3, 8)
    other = Mlp(8, 16)

    def step() -> None:
        optimiser = torch.optim.SGD(mlp.parameters(), lr=0.5)
        mlp(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    def assign() -> None:
        mlp.fc1.weight = nn.Parameter(torch.randn(16, 8))

    for edit in (
        step,
        assign,
        lambda: mlp.fc1.weight.data.mul_(3),
        lambda: mlp.fc2.weight.detach().zero_(),
        lambda: mlp.load_state_dict(other.state_dict()),
    ):
        with torch.set_grad_enabled(training):
            before = mlp(x)
        edit()
        with torch.set_grad_enabled(training):
            found = mlp(x)
        assert not torch.equal(found, before)
        close(found, F.linear(F.gelu(F.linear(x, *mlp.fc1.parameters())), *mlp.fc2.parameters()))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("training", [True, False])
def test_the_mlp_equals_timms(rows: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "HIDDEN_AT_ONCE", 2**10)
    monkeypatch.setattr(parts, "GROUP", 2**10)
    mlp, theirs = Mlp(6, 24), TimmMlp(6, 24)
    theirs.load_state_dict(mlp.state_dict())
    x = torch.randn(1, rows, 6)
    with torch.set_grad_enabled(training):
        found, expected = mlp(x), theirs(x)
        close(found, expected)
    if training:
        grad = torch.randn_like(x)
        for gradient, true in zip(
            torch.autograd.grad(found, list(mlp.parameters()), grad),
            torch.autograd.grad(expected, list(theirs.parameters()), grad),
            strict=True,
        ):
            torch.testing.assert_close(gradient, true, rtol=1e-4, atol=1e-4)


def test_hooks_and_layers_put_in_place_are_called() -> None:
    mlp, x, seen = Mlp(4, 8), torch.randn(2, 4), []
    handle = mlp.fc1.register_forward_hook(lambda *_, **__: seen.append("hook"))
    with torch.no_grad():
        expected = mlp(x)
    assert seen == ["hook"]
    handle.remove()
    adapted = copy.deepcopy(mlp)
    adapted.fc2 = nn.Sequential(mlp.fc2, nn.Identity())
    adapted.fc2.register_forward_hook(lambda *_: seen.append("replaced"))
    with torch.no_grad():
        close(adapted(x), expected)
    assert seen == ["hook", "replaced"]


def test_whoever_counts_sees_the_products() -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Mlp(4, 8)(torch.randn(3, 4))
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 8


def test_autocast_and_other_types() -> None:
    mlp, x = Mlp(4, 8), torch.randn(3, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert mlp(x).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.bfloat16):
        with torch.no_grad():
            assert mlp.to(dtype)(x.to(dtype)).dtype == dtype


def test_function_transforms() -> None:
    weight, x = torch.randn(5, 4), torch.randn(3, 2, 4)
    close(torch.vmap(linear, (0, None))(x, weight), F.linear(x, weight))
    found = torch.func.grad(lambda w: linear(x, w).square().sum())(weight)
    close(found, torch.func.grad(lambda w: F.linear(x, w).square().sum())(weight))


def test_a_wrong_shape_is_named_by_torch() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Linear(4, 3)(torch.randn(2, 5))


@pytest.mark.parametrize("size", [(1, 14, 14), (2, 9, 7), (1, 1, 1), (1, 40, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(size: tuple[int, int, int], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a product where the image is small and no gradient is wanted, else as PyTorch's own."""
    calls = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda *args: calls.append(args) or product(*args))
    batch, height, width = size
    conv = module.Conv2d(128, 5, 3, stride=2, padding=1, bias=bias)
    x = torch.randn(batch, height, width, 128).permute(0, 3, 1, 2)
    expected = conv(x)
    assert not calls
    with torch.no_grad():
        close(conv(x), expected)
    assert len(calls) == (module._ONEDNN and height < 40)
