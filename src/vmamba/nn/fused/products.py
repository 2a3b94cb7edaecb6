"""Products and convolutions by the library that is faster on this processor, fused with activations.

n rows, i features in, o features out.

`F.linear` in float32 goes to MKL on x86, which does not use AVX-512 on processors that are not Intel's.
oneDNN, which comes with PyTorch too, uses it everywhere, and can fuse GELU with the product. It reorders the
weights in each call instead of keeping a copy, which could become stale. Without AVX-512 MKL is faster, and
PyTorch's GELU faster than oneDNN's.

Only fused forms call this module, so x is a plain CPU tensor, and no hook, mode or transform is active.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba import _torch_private
from vmamba.nn.fused import blocking
from vmamba.nn.fused.entry import needs_plain_backward

_MKL_IS_FASTER = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() in (
    "AVX2",
    "DEFAULT",
)
"""Whether products in float32 go to MKL after all."""
_MOST_PATCHES = 128
"""Output pixels up to which a convolution is computed as a product over patches."""


def onednn_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which oneDNN may form x·weightᵀ, autocast included; None to leave it to `F.linear`."""
    if not (_torch_private.HAS_ONEDNN_POINTWISE and torch.backends.mkldnn.enabled and weight.is_cpu):
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    elif x.dtype == weight.dtype:
        dtype = x.dtype
    else:
        return None
    if dtype == torch.float32 or (dtype == torch.bfloat16 and _torch_private.onednn_has_bfloat16()):
        return dtype
    return None


def _without_autocast() -> AbstractContextManager[Any]:
    """Autocast off within the block; where it is off, entering it would cost more than a small product."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def _is_float32(x: Tensor, weight: Tensor) -> bool:
    return onednn_dtype(x, weight) == torch.float32  # in bfloat16 `F.linear` calls oneDNN itself


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """x·weightᵀ + bias, then GELU if asked for, by the faster library; x (..., i), weight (o, i)."""
    if _MKL_IS_FASTER and x.dtype == torch.float32:
        y = F.linear(x, weight, bias)
        return torch.ops.aten.gelu_(y) if gelu else y
    return _torch_private.onednn_linear(x, weight, bias, gelu)


def _input_gradient(grad: Tensor, weight: Tensor, plain: bool) -> Tensor:
    """The gradient of x of `_product`; if `plain`, by a call that can itself be differentiated."""
    return grad @ weight if plain else _product(grad, weight.t())


def _weight_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, for_weight: bool, for_bias: bool, plain: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias of `_product`, for grad (..., o) and x (..., i).

    oneDNN computes them as those of a 1×1 convolution over an image of one row; if `plain`, they are computed
    by calls that can themselves be differentiated and transformed.
    """
    if not for_weight and not for_bias:
        return None, None
    if plain or _MKL_IS_FASTER:
        rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return rows.t() @ x_rows if for_weight else None, rows.sum(0) if for_bias else None
    grad_line, x_line = (t.reshape(1, 1, -1, t.shape[-1]).permute(0, 3, 1, 2) for t in (grad, x))
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_line,
        x_line,
        weight[:, :, None, None],
        bias_sizes=[weight.shape[0]],
        stride=[1, 1],
        padding=[0, 0],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=[False, for_weight, for_bias],
    )
    return (grad_weight[:, :, 0, 0] if for_weight else None), grad_bias


def _gradients_by_autograd(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """The gradients of `function` by autograd, which can themselves be differentiated and transformed."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        if not differentiable:
            inputs = [
                None if t is None else t.detach().requires_grad_(asked)
                for t, asked in zip(inputs, wanted, strict=True)
            ]
        out = function(*inputs)
        sources = [t for t, asked in zip(inputs, wanted, strict=True) if asked and t is not None]
        gradients = iter(torch.autograd.grad(out, sources, grad, create_graph=differentiable))
    return [next(gradients) if asked else None for asked in wanted]


class _Product(torch.autograd.Function):
    """x·weightᵀ + bias."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        plain = needs_plain_backward(grad)
        grad = grad if plain else grad.contiguous()
        grad_x = _input_gradient(grad, weight, plain) if for_x else None
        return grad_x, *_weight_gradients(grad, x, weight, for_weight, for_bias, plain)


class _GeluProduct(torch.autograd.Function):
    """GELU(x)·weightᵀ + bias. Keeps x alone for backward, which forms GELU(x) again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        plain = needs_plain_backward(grad)
        grad = grad if plain else grad.contiguous()
        grad_x = torch.ops.aten.gelu_backward(_input_gradient(grad, weight, plain), x) if for_x else None
        return grad_x, *_weight_gradients(grad, F.gelu(x), weight, for_weight, for_bias, plain)


class _NormedProduct(torch.autograd.Function):
    """LayerNorm(x)·weightᵀ. Keeps x alone for backward, which forms LayerNorm(x) again."""

    @staticmethod
    def forward(
        x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean, rstd = torch.native_layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
        return _product(normed, weight), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, norm_weight, norm_bias, ctx.eps, weight = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, mean, rstd = ctx.saved_tensors
        for_x, for_norm_weight, for_norm_bias, _, for_weight = ctx.needs_input_grad
        for_norm = [for_x, for_norm_weight, for_norm_bias]
        if needs_plain_backward(grad):

            def plain(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor) -> Tensor:
                return F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, ctx.eps), weight)

            *grads_norm, grad_weight = _gradients_by_autograd(
                plain, (x, norm_weight, norm_bias, weight), [*for_norm, for_weight], grad
            )
            return (*grads_norm, None, grad_weight)
        grad = grad.contiguous()
        normed = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, ctx.eps)
        grad_weight = _weight_gradients(grad, normed, weight, for_weight, False)[0]
        grad_normed = _product(grad, weight.t())
        grads_norm = torch.ops.aten.native_layer_norm_backward(
            grad_normed, x, norm_weight.shape, mean, rstd, norm_weight, norm_bias, for_norm
        )
        return (*grads_norm, None, grad_weight)


class _ConvolvedSilu(torch.autograd.Function):
    """SiLU(conv(x)). Keeps x alone for backward, which convolves again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        return _torch_private.onednn_conv(x, weight, bias, geometry, silu=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.geometry = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        padding, stride, dilation, groups = ctx.geometry
        for_x, for_weight, for_bias, _ = ctx.needs_input_grad
        wanted = [for_x, for_weight, for_bias]
        if needs_plain_backward(grad):

            def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return F.silu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

            return (*_gradients_by_autograd(plain, (x, weight, bias), wanted, grad), None)
        convolved = _torch_private.onednn_conv(x, weight, bias, ctx.geometry, silu=False)
        gradients = torch.ops.aten.convolution_backward(
            torch.ops.aten.silu_backward(grad, convolved),
            x,
            weight,
            bias_sizes=None if bias is None else list(bias.shape),
            stride=stride,
            padding=padding,
            dilation=dilation,
            transposed=False,
            output_padding=[0, 0],
            groups=groups,
            output_mask=wanted,
        )
        return (*(g if asked else None for g, asked in zip(gradients, wanted, strict=True)), None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., i), (o, i), (o,) → (..., o)."""
    if _is_float32(x, weight) and x.shape[-1] == weight.shape[-1]:  # else F.linear says what is wrong
        return _Product.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)
    return F.linear(x, weight, bias)


def normed_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor | None:
    """layer(norm(x)), keeping x alone for backward; None where that is not supported."""
    norm_weight, norm_bias = norm._parameters["weight"], norm._parameters["bias"]
    if (
        torch.is_grad_enabled()
        and layer._parameters["bias"] is None
        and norm_weight is not None
        and norm_bias is not None
        and _is_float32(x, layer.weight)
        and norm_weight.dtype == torch.float32
        and x.shape[-1] == layer.in_features == norm_weight.shape[0]
    ):
        return _NormedProduct.apply(x, norm_weight, norm_bias, norm.eps, layer.weight)[0]
    return None


def linear_gelu_linear(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """fc2(GELU(fc1(x))), (..., i) → (..., o), in chunks of rows."""
    dtype = onednn_dtype(x, fc1.weight)
    fits = x.shape[-1] == fc1.in_features and fc1.weight.dtype == fc2.weight.dtype
    if fits and dtype is not None and not torch.is_grad_enabled():
        return _linear_gelu_linear_without_gradients(x, fc1, fc2, dtype)
    if fits and dtype == torch.float32:

        def mlp(rows: Tensor) -> Tensor:
            return _GeluProduct.apply(linear(rows, fc1.weight, fc1.bias), fc2.weight, fc2.bias)

        rows = x.reshape(-1, x.shape[-1])
        y = blocking.in_groups(mlp, rows, len(rows) * fc1.out_features)
        return y.view(*x.shape[:-1], -1)
    return linear(F.gelu(linear(x, fc1.weight, fc1.bias)), fc2.weight, fc2.bias)


def _linear_gelu_linear_without_gradients(
    x: Tensor, fc1: nn.Linear, fc2: nn.Linear, dtype: torch.dtype
) -> Tensor:
    """GELU fused with the first product; the hidden layer is never in memory as a whole."""
    weight1, bias1, weight2, bias2 = (
        None if t is None else t.to(dtype) for t in (fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    )
    assert weight1 is not None
    assert weight2 is not None
    step = blocking.rows_at_once(fc1.out_features)
    with _without_autocast():
        results = [
            _product(_product(rows.to(dtype), weight1, bias1, gelu=True), weight2, bias2)
            for rows in x.reshape(-1, x.shape[-1]).split(step)
        ]
    return (results[0] if len(results) == 1 else torch.cat(results)).view(*x.shape[:-1], -1)


def conv_silu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """SiLU(conv(x)), channels last, (b, h, w, d) → (b, h, w, d), in one call of oneDNN where it has one."""
    images = x.permute(0, 3, 1, 2)
    dtype = onednn_dtype(x, conv.weight)
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    if torch.is_grad_enabled() and dtype == torch.float32:
        return _ConvolvedSilu.apply(images, conv.weight, conv.bias, geometry).permute(0, 2, 3, 1)
    if torch.is_grad_enabled() or dtype is None:
        return F.silu(conv(images).permute(0, 2, 3, 1))
    weight, bias = conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
    with _without_autocast():
        y = _torch_private.onednn_conv(images.to(dtype), weight, bias, geometry, silu=True)
    return y.permute(0, 2, 3, 1)


def conv2d(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(x), (b, c, h, w) in channels-last memory, as a product over patches where the output is small.

    oneDNN's convolution of many channels takes as long for one image of 14×14 as for eight.
    """
    if not _is_small(x, conv):
        return conv(x)
    assert not isinstance(conv.padding, str)
    (top, left), (height, width) = conv.padding, conv.kernel_size
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    patches = padded.unfold(1, height, conv.stride[0]).unfold(2, width, conv.stride[1])
    rows = patches.flatten(3)  # (b, h', w', c·kh·kw), the order of the weight
    return _product(rows, conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def _is_small(x: Tensor, conv: nn.Conv2d) -> bool:
    return (
        not torch.is_grad_enabled()
        and _is_float32(x, conv.weight)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and x.ndim == 4
        and x.shape[1] == conv.in_channels >= 128
        and x.shape[0] * x.shape[2] * x.shape[3] <= _MOST_PATCHES * conv.stride[0] * conv.stride[1]
    )
