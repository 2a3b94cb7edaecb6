"""Every module of the tree is called as a module, exactly once, whenever something listens."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.modules import module as module_hooks

import vmamba

MODELS = {
    "default": {"drop_path_rate": 0.1},
    "gate": {"gate": True, "ssm_conv_bias": True, "d_state": 2},
    "cascade": {"routes": "cascade"},
    "no convolution": {"ssm_conv": 0},
    "vanilla": {"gate": True, "mlp_ratio": 0.0, "stem": "patch", "downsample": "merge"},
}


def build(name: str) -> vmamba.VMamba:
    return vmamba.VMamba(num_classes=3, depths=(1, 1), dims=(8, 16), **MODELS[name]).eval()


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], torch.utils.hooks.RemovableHandle]] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward with keywords": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "forward pre": lambda m, f: m.register_forward_pre_hook(f),
    "full backward": lambda m, f: m.register_full_backward_hook(f),
    "full backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
}
GLOBAL_HOOKS = {
    "forward": module_hooks.register_module_forward_hook,
    "forward pre": module_hooks.register_module_forward_pre_hook,
    "full backward": module_hooks.register_module_full_backward_hook,
    "full backward pre": module_hooks.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", MODELS)
def test_each_module_in_turn(name: str, kind: str) -> None:
    model, x = build(name), torch.randn(2, 3, 16, 20, requires_grad=True)
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for path, module in model.named_modules():
        calls: list[object] = []
        handle = HOOKS[kind](module, lambda *args, calls=calls: calls.append(args[0]))
        logits = model(x)
        (actual,) = torch.autograd.grad(logits.square().sum(), x)
        assert calls == [module], path
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(actual, gradient, rtol=1e-3, atol=1e-4)
        if kind.startswith("forward"):
            with torch.no_grad():
                torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            assert calls == [module, module], path
        handle.remove()


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gradients", [True, False])
def test_global_hooks_see_every_module(name: str, kind: str, gradients: bool) -> None:
    if "backward" in kind and not gradients:
        pytest.skip("no backward pass without gradients")
    model, x = build(name), torch.randn(2, 3, 16, 20, requires_grad=True)
    calls: list[nn.Module] = []
    handle = GLOBAL_HOOKS[kind](lambda *args: calls.append(args[0]))
    try:
        with nullcontext() if gradients else torch.no_grad():
            logits = model(x)
        if gradients:
            logits.sum().backward()
    finally:
        handle.remove()
    assert sorted(map(id, calls)) == sorted(map(id, model.modules()))


@pytest.mark.parametrize("gradients", [True, False])
def test_hooks_under_checkpointing(gradients: bool) -> None:
    model, x = build("default"), torch.randn(2, 3, 16, 20, requires_grad=True)
    model.set_grad_checkpointing()
    calls: list[str] = []
    for path in ("stages.1.blocks", "stages.1.blocks.0", "stages.1.blocks.0.op.out_norm"):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    with nullcontext() if gradients else torch.no_grad():
        logits = model(x)
    assert sorted(calls) == ["stages.1.blocks", "stages.1.blocks.0", "stages.1.blocks.0.op.out_norm"]
    if gradients:
        logits.sum().backward()
        assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hooks_of_a_model_put_to_half(dtype: torch.dtype) -> None:
    """out_norm is called on float32 there."""
    model, x = build("gate").to(dtype), torch.randn(2, 3, 16, 20, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
        for path, module in model.named_modules():
            calls: list[object] = []
            handle = module.register_forward_hook(lambda m, *_, calls=calls: calls.append(m))
            torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.02)
            handle.remove()
            assert calls == [module], path
    assert model.stages[0].blocks[0].op.out_norm.weight.dtype == dtype
    assert isinstance(model.stages[0].blocks[0].op.out_norm.weight, nn.Parameter)


def test_a_hook_may_change_the_result() -> None:
    model, x = build("default"), torch.randn(2, 3, 16, 20)
    for path, module in model.named_modules():
        with torch.no_grad():
            expected = model(x)
            handle = module.register_forward_hook(lambda m, args, out: out * 0 + 0.1)
            assert not torch.allclose(model(x), expected), path
            handle.remove()
