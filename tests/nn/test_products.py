"""Products and convolutions of the fused forms: what PyTorch's own calls give, by either library."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vmamba
from vmamba import _torch_private
from vmamba.nn import ConvDownsample, Mlp
from vmamba.nn.fused import blocking, products
from vmamba.nn.fused.products import conv_silu, linear, normed_linear

onednn = pytest.mark.skipif(not _torch_private.HAS_ONEDNN_POINTWISE, reason="oneDNN is used on x86 alone")


@pytest.fixture(autouse=True, params=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32 by either library, whatever serves this processor better."""
    monkeypatch.setattr(products, "_MKL_IS_FASTER", request.param == "MKL")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each product by the faster library."""
    made: list[object] = []
    product = products._product
    monkeypatch.setattr(
        products, "_product", lambda *args, **kwargs: made.append(args) or product(*args, **kwargs)
    )
    return made


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def plainly(layer: nn.Module, x: Tensor) -> Tensor:
    with vmamba.nn.fused(False):
        return layer(x)


@onednn
def test_the_faster_library_is_called(calls: list[object]) -> None:
    mlp, x = Mlp(4, 8), torch.randn(2, 4, requires_grad=True)
    mlp(x).sum().backward()
    assert len(calls) == 4  # two products, and the gradient of what each takes
    with torch.no_grad():
        mlp(x)
        assert len(calls) == 6
        plainly(mlp, x)
    assert len(calls) == 6


@pytest.mark.parametrize("lead", [(5,), (1, 7), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(lead: tuple[int, ...], bias: bool) -> None:
    inputs = [torch.randn(*lead, 6), torch.randn(5, 6)] + [torch.randn(5)] * bias
    for t in inputs:
        t.requires_grad_()
    y, expected = linear(*inputs), F.linear(*inputs)
    close(y, expected)
    grad = torch.randn(5).expand_as(y)  # as the gradient of a sum comes: without strides
    gradients = zip(*(torch.autograd.grad(out, inputs, grad) for out in (y, expected)), strict=True)
    for actual, true in gradients:
        close(actual, true)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_alone(wanted: tuple[int, ...]) -> None:
    tensors = [torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)]
    for i in wanted:
        tensors[i].requires_grad_()
    results = [
        torch.autograd.grad(function(*tensors).square().sum(), [tensors[i] for i in wanted])
        for function in (linear, F.linear)
    ]
    for actual, true in zip(*results, strict=True):
        close(actual, true)


def test_second_derivatives() -> None:
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (5, 4), (5,)))
    results = []
    for function in (linear, F.linear):
        first = torch.autograd.grad(function(x, weight, bias).pow(3).sum(), [x, weight], create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, weight, bias]))
    for actual, true in zip(*results, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-4, atol=1e-3)


@onednn
def test_norm_and_product() -> None:
    norm, layer = nn.LayerNorm(4), nn.Linear(4, 3, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 4, requires_grad=True)
    tensors = [x, norm.weight, norm.bias, layer.weight]
    saved, results = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = normed_linear(x, norm, layer)
    assert saved.count(x.shape) == 1
    for out in (y, layer(norm(x))):
        first = torch.autograd.grad(out.pow(3).sum(), tensors, create_graph=True)
        plain = torch.autograd.grad(out.pow(3).sum(), tensors, retain_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        results.append([out, *first, *plain, *second])
    for actual, true in zip(*results, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-3, atol=1e-3)
    (of_bias,) = torch.autograd.grad(normed_linear(x.detach(), norm, layer).sum(), [norm.bias])
    close(of_bias, torch.autograd.grad(layer(norm(x)).sum(), [norm.bias])[0])
    with torch.no_grad():
        assert normed_linear(x, norm, layer) is None
    for other in (nn.LayerNorm(4, bias=False), nn.LayerNorm(4, elementwise_affine=False)):
        assert normed_linear(x, other, layer) is None
    assert normed_linear(x, norm, nn.Linear(4, 3)) is None


@onednn
def test_the_mlp_keeps_its_hidden_layer_once() -> None:
    mlp, x, saved = Mlp(4, 8), torch.randn(3, 4), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        mlp(x)
    assert saved.count((3, 8)) == 1


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
            after = mlp(x)
        assert not torch.equal(after, before)
        close(after, F.linear(F.gelu(F.linear(x, *mlp.fc1.parameters())), *mlp.fc2.parameters()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("training", [True, False])
def test_the_mlp(rows: int, training: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "CACHED_VALUES", 2**10)
    monkeypatch.setattr(blocking, "GROUP_VALUES", 2**10)
    mlp, x = Mlp(6, 24), torch.randn(1, rows, 6)
    if not bias:
        mlp.fc1, mlp.fc2 = nn.Linear(6, 24, bias=False), nn.Linear(24, 6, bias=False)
    with torch.set_grad_enabled(training):
        y, expected = mlp(x), plainly(mlp, x)
        close(y, expected)
    if training:
        grad, parameters = torch.randn_like(x), list(mlp.parameters())
        results = [torch.autograd.grad(out, parameters, grad, create_graph=True) for out in (y, expected)]
        results += [torch.autograd.grad(out, parameters, grad, retain_graph=True) for out in (y, expected)]
        for first, second in (results[:2], results[2:]):
            for actual, true in zip(first, second, strict=True):
                torch.testing.assert_close(actual, true, rtol=1e-4, atol=1e-4)


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


def test_a_wrong_shape_is_named_by_torch() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        Mlp(4, 3)(torch.randn(2, 5))


@onednn
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
        nn.Conv2d(6, 6, 5, padding=2, groups=6),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6),
        nn.Conv2d(6, 4, 1),
    ],
    ids=str,
)
def test_convolution_and_silu(conv: nn.Conv2d) -> None:
    x = torch.randn(2, 5, 7, 6, requires_grad=True)
    expected = F.silu(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    y, grad, inputs = conv_silu(x, conv), torch.randn_like(expected), (x, *conv.parameters())
    close(y, expected)
    gradients = [torch.autograd.grad(out, inputs, grad, create_graph=True) for out in (y, expected)]
    for actual, true in zip(*gradients, strict=True):
        close(actual, true)
    close(torch.autograd.grad(y, x, grad, retain_graph=True)[0], gradients[1][0])
    second = [torch.autograd.grad(g[0].square().sum(), inputs) for g in gradients]
    for actual, true in zip(*second, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-4, atol=1e-4)
    x, expected = x.detach(), expected.detach()
    with torch.no_grad():
        close(conv_silu(x, conv), expected)
        assert conv_silu(x.double(), conv.double()).dtype == torch.float64
        conv.float()
        with torch.autocast("cpu", torch.bfloat16):
            half = conv_silu(x, conv)
        torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("size", [(1, 14, 14), (2, 9, 7), (1, 1, 1), (1, 40, 40)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_a_small_convolution_is_a_product(
    size: tuple[int, int, int], dilation: int, calls: list[object]
) -> None:
    """Where the image is small, no gradient is wanted and nothing is dilated; else PyTorch's own call."""
    batch, height, width = size
    down = ConvDownsample(128, 5, dilation=dilation)
    x = torch.randn(batch, height, width, 128)
    expected = down(x)
    assert not calls
    with torch.no_grad():
        torch.testing.assert_close(down(x), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == (_torch_private.HAS_ONEDNN_POINTWISE and height < 40 and dilation == 1)


@onednn
@pytest.mark.parametrize("create_graph", [False, True])
def test_a_batch_of_gradients_at_once(create_graph: bool) -> None:
    """`is_grads_batched` runs the backward passes under vmap."""
    norm, layer, mlp = nn.LayerNorm(4), nn.Linear(4, 4, bias=False), Mlp(4, 8)
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    x = torch.randn(2, 3, 3, 4, requires_grad=True)
    tensors = [x, norm.weight, layer.weight, conv.weight, *mlp.parameters()]
    y = mlp(normed_linear(conv_silu(x, conv), norm, layer))
    grads = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(
        y, tensors, grads, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(y, tensors, grad, retain_graph=True)
        for actual, true in zip(batched, one, strict=True):
            torch.testing.assert_close(actual[i], true, rtol=1e-4, atol=1e-4)
