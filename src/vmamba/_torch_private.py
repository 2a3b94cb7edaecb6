"""The private interfaces of PyTorch that this library uses, each with the reason.

tests/test_private.py fails when one of them changes its meaning.
"""

import platform
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

# --- vmamba.nn.fused: does anything watch, record or transform what a layer calls? -------------------------

# There is no public question for "is a global module hook registered". The dictionaries are changed in place
# and never replaced, so that they may be kept.
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def has_global_hook() -> bool:
    """Whether a hook is registered for every module."""
    forward, forward_pre, backward, backward_pre = _GLOBAL_HOOKS
    return bool(forward or forward_pre or backward or backward_pre)


def is_transformed_or_recorded() -> bool:
    """Whether a transform of torch.func, a dual level, a mode or torch.jit.trace is active in this thread.

    None of these questions has a public form.
    """
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def is_legacy_batch(t: torch.Tensor) -> bool:
    """Whether a tensor stands for many, as gradients do in `torch.autograd.grad(is_grads_batched=True)`.

    That call does not use torch.func.vmap but an older form, which `is_transformed_or_recorded` misses.
    """
    return torch._C._functorch.is_legacy_batchedtensor(t)


def is_watched(attributes: dict[str, Any]) -> bool:
    """Whether a call of a module is more than its class's `forward`.

    That is: a hook of any kind is registered on it, the instance has a `forward` of its own, or its method
    `compile` was called. No public method tells.

    Args:
        attributes: The module's `__dict__`.
    """
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or attributes.get("_compiled_call_impl") is not None
    )


# --- vmamba.nn.fused: products and convolutions of oneDNN with an activation joined to them ----------------

HAS_ONEDNN_POINTWISE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether oneDNN's joined operators are there; they have no public form, torch.compile uses them."""


def onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> torch.Tensor:
    """x·weightᵀ + bias, then GELU if asked for."""
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


def onednn_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: tuple[Any, ...],
    silu: bool,
) -> torch.Tensor:
    """A convolution of (padding, stride, dilation, groups), then SiLU if asked for."""
    activation = "swish" if silu else "none"
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, activation, [], "")


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
