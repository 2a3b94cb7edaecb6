"""The private interfaces of PyTorch still mean what we take them for."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vmamba import _torch_private

onednn = pytest.mark.skipif(
    not _torch_private.HAS_ONEDNN_POINTWISE, reason="oneDNN's joined operators are on x86 alone"
)


@pytest.mark.parametrize(
    "register",
    [
        module_hooks.register_module_forward_hook,
        module_hooks.register_module_forward_pre_hook,
        module_hooks.register_module_full_backward_hook,
        module_hooks.register_module_full_backward_pre_hook,
    ],
)
def test_global_hooks(register) -> None:
    assert not _torch_private.has_global_hook()
    handle = register(lambda *_: None)
    assert _torch_private.has_global_hook()
    handle.remove()
    assert not _torch_private.has_global_hook()


@pytest.mark.parametrize(
    "watch",
    [
        lambda m: m.register_forward_hook(print),
        lambda m: m.register_forward_hook(print, with_kwargs=True, always_call=True),
        lambda m: m.register_forward_pre_hook(print),
        lambda m: m.register_full_backward_hook(print),
        lambda m: m.register_full_backward_pre_hook(print),
        lambda m: m.compile(),
        lambda m: setattr(m, "forward", lambda x: x),
    ],
)
def test_a_watched_module(watch) -> None:
    module = nn.Linear(2, 2)
    assert not _torch_private.is_watched(vars(module))
    watch(module)
    assert _torch_private.is_watched(vars(module))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # PyTorch's own, by its first jvp
def test_transforms_and_modes() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch_private.is_transformed_or_recorded())
        return x.sum()

    x = torch.randn(3)
    look(x)
    assert seen == [False]
    torch.func.grad(look)(x)
    torch.vmap(look)(x)
    torch.func.jvp(look, (x,), (x,))
    with forward_ad.dual_level():
        look(x)
    with TorchDispatchMode():
        seen.append(_torch_private.is_transformed_or_recorded())
    with TorchFunctionMode():
        seen.append(_torch_private.is_transformed_or_recorded())
    assert all(seen[1:])
    assert len(seen) == 7
    assert not _torch_private.is_transformed_or_recorded()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
def test_tracing() -> None:
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(_torch_private.is_transformed_or_recorded())
        return x + 1

    torch.jit.trace(look, torch.ones(1), check_trace=False)
    assert seen == [True]


def test_a_batch_of_gradients() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            seen.append(_torch_private.is_legacy_batch(grad) or _torch_private.is_transformed_or_recorded())
            return grad

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Look.apply(x), x, torch.eye(2), is_grads_batched=True)
    torch.autograd.grad(Look.apply(x), x, torch.ones(2))
    assert seen == [True, False]


@onednn
def test_onednn_linear() -> None:
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for b in (bias, None):
        expected = F.linear(x, weight, b)
        torch.testing.assert_close(_torch_private.onednn_linear(x, weight, b, False), expected)
        joined = _torch_private.onednn_linear(x, weight, b, True)
        torch.testing.assert_close(joined, F.gelu(expected), rtol=1e-5, atol=1e-5)


@onednn
def test_onednn_conv() -> None:
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4)
    expected = F.conv2d(x, weight, bias, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=4)
    geometry = ((1, 2), (2, 1), (1, 2), 4)
    plain = _torch_private.onednn_conv(x, weight, bias, geometry, silu=False)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    joined = _torch_private.onednn_conv(x, weight, bias, geometry, silu=True)
    torch.testing.assert_close(joined, F.silu(expected), rtol=1e-5, atol=1e-5)
    assert isinstance(_torch_private.onednn_has_bfloat16(), bool)
