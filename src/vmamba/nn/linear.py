"""Linear layers, the MLP and a convolution, on the fast path of the processor at hand.

M rows, I features in, O features out.

`F.linear` in float32 goes to MKL on x86, which leaves AVX-512 unused on processors that are not Intel's;
oneDNN, which comes with PyTorch too, uses it everywhere, and joins GELU to the product. The weights stay as
they are: oneDNN turns them into its own order in each call, so that no copy can be stale. Without AVX-512 MKL
is the faster one, and PyTorch's GELU faster than oneDNN's. Wherever something looks at the call or changes it
(compilation, tracing, autocast, subclasses of Tensor, dispatch modes, function transforms), the layers are
`F.linear` and nothing else.
"""

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.nn import parts

_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
_MKL = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT")
"""Whether products in float32 go to MKL after all."""
_FEW = 128
"""Pixels up to which a convolution is a product over patches."""


def _direct_type(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The type in which `_product` is to form x·weightᵀ, or None where `F.linear` is to."""
    if not (
        _ONEDNN
        and parts.runs_as_written(x)
        and type(weight) in (Tensor, nn.Parameter)
        and torch.backends.mkldnn.enabled
    ):
        return None
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    elif x.dtype == weight.dtype:
        dtype = x.dtype
    else:
        return None
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return dtype
    return None


def _is_direct(x: Tensor, weight: Tensor) -> bool:
    return _direct_type(x, weight) == torch.float32  # in bfloat16 `F.linear` goes there itself


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """activation(x·weightᵀ + bias), "none" or "gelu", by the faster library; x (…, I), weight (O, I)."""
    if _MKL and x.dtype == torch.float32:
        y = F.linear(x, weight, bias)
        return torch.ops.aten.gelu_(y) if activation == "gelu" else y
    return torch.ops.mkldnn._linear_pointwise(
        x, weight, bias, activation, [], "none" if activation == "gelu" else ""
    )


def _weight_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, for_weight: bool, for_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of `_product`; by oneDNN as those of a 1×1 convolution over a line; grad (…, O), x (…, I)."""
    if not for_weight and not for_bias:
        return None, None
    if _MKL:
        rows = grad.flatten(0, -2)
        return rows.t() @ x.flatten(0, -2) if for_weight else None, rows.sum(0) if for_bias else None
    _, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        *(t.reshape(1, 1, -1, t.shape[-1]).permute(0, 3, 1, 2) for t in (grad, x)),
        *(weight[:, :, None, None], [weight.shape[0]]),
        *([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, for_weight, for_bias]),
    )
    return (grad_weight[:, :, 0, 0] if for_weight else None), grad_bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        if torch.is_grad_enabled():  # second derivatives
            return (
                grad @ weight if for_x else None,
                rows.t() @ x.flatten(0, -2) if for_weight else None,
                rows.sum(0) if for_bias else None,
            )
        grad = grad.contiguous()
        return (
            _product(grad, weight.t()) if for_x else None,
            *_weight_gradients(grad, x, weight, for_weight, for_bias),
        )


class _GeluProduct(torch.autograd.Function):
    """GELU(x)·weightᵀ + bias, for whose backward x alone is kept: GELU(x) is formed again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _product(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if torch.is_grad_enabled():  # second derivatives
            rows, activated = grad.flatten(0, -2), F.gelu(x).flatten(0, -2)
            return (
                torch.ops.aten.gelu_backward(grad @ weight, x) if for_x else None,
                rows.t() @ activated if for_weight else None,
                rows.sum(0) if for_bias else None,
            )
        grad = grad.contiguous()
        return (
            torch.ops.aten.gelu_backward(_product(grad, weight.t()), x) if for_x else None,
            *_weight_gradients(grad, F.gelu(x), weight, for_weight, for_bias),
        )


class _NormedProduct(torch.autograd.Function):
    """LayerNorm(x)·weightᵀ, for whose backward x alone is kept: LayerNorm(x) is formed again."""

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
        *for_norm, _, for_weight = ctx.needs_input_grad
        if torch.is_grad_enabled():  # second derivatives
            tensors = [x, norm_weight, norm_bias, weight]
            wanted = [t for t, asked in zip(tensors, [*for_norm, for_weight], strict=True) if asked]
            out = F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, ctx.eps), weight)
            found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
            first = [next(found) if asked else None for asked in for_norm]
            return (*first, None, next(found) if for_weight else None)
        grad = grad.contiguous()
        normed = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, ctx.eps)
        grad_weight = _weight_gradients(grad, normed, weight, for_weight, False)[0]
        of_norm = torch.ops.aten.native_layer_norm_backward(
            *(_product(grad, weight.t()), x, norm_weight.shape, mean, rstd, norm_weight, norm_bias, for_norm)
        )
        return (*of_norm, None, grad_weight)


def normed_product(x: Tensor, norm: nn.LayerNorm, layer: nn.Module) -> Tensor | None:
    """layer(norm(x)) for a layer without bias, which keeps x alone for backward, or None where it cannot."""
    if (
        torch.is_grad_enabled()
        and isinstance(layer, Linear)
        and _untouched(layer, Linear)
        and layer._parameters["bias"] is None
        and _is_direct(x, layer.weight)
        and norm.weight.dtype == torch.float32
        and x.shape[-1] == layer.in_features
    ):
        return _NormedProduct.apply(x, norm.weight, norm.bias, norm.eps, layer.weight)[0]
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (…, I), (O, I), (O,) → (…, O)."""
    if _is_direct(x, weight) and x.shape[-1] == weight.shape[-1]:  # else F.linear says what is wrong
        return _Product.apply(x, weight, bias) if torch.is_grad_enabled() else _product(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)


def _untouched(layer: nn.Module, kind: type) -> bool:
    """Whether what the layer does is known: none has taken its place, and no hook is on it."""
    return type(layer) is kind and not layer._forward_hooks and not layer._forward_pre_hooks


class Mlp(nn.Module):
    """Linear, GELU, linear, with the names of timm's `Mlp`; (…, dim) → (…, dim)."""

    def __init__(
        self, dim: int, hidden: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            dtype = self._joint_type(x)
            if dtype is not None and not torch.is_grad_enabled():
                return self._in_parts(x, dtype)
            if dtype == torch.float32:
                rows = x.reshape(-1, x.shape[-1])
                values = len(rows) * self.fc1.out_features
                return parts.in_groups(self._joined, rows, values).view(*x.shape[:-1], -1)
        return self.fc2(self.act(self.fc1(x)))

    def _joined(self, x: Tensor) -> Tensor:
        return _GeluProduct.apply(self.fc1(x), self.fc2.weight, self.fc2.bias)

    def _joint_type(self, x: Tensor) -> torch.dtype | None:
        """The type in which GELU may be joined to the products, or None."""
        known = ((self.fc1, Linear), (self.act, nn.GELU), (self.fc2, Linear))
        if not all(_untouched(layer, kind) for layer, kind in known):
            return None
        dtype = _direct_type(x, self.fc1.weight)
        if dtype is None or x.shape[-1] != self.fc1.in_features:
            return None
        return dtype if self.fc1.weight.dtype == self.fc2.weight.dtype else None

    def _in_parts(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Without gradients: some rows at a time, GELU in the first product, no hidden layer in memory."""
        weight1, bias1, weight2, bias2 = (
            t.to(dtype) for t in (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        )
        step = max(64, parts.HIDDEN_AT_ONCE // self.fc1.out_features)
        with torch.autocast("cpu", enabled=False):
            found = [
                _product(_product(part.to(dtype), weight1, bias1, "gelu"), weight2, bias2)
                for part in x.reshape(-1, x.shape[-1]).split(step)
            ]
        return (found[0] if len(found) == 1 else torch.cat(found)).view(*x.shape[:-1], -1)


class _ConvolvedSilu(torch.autograd.Function):
    """SiLU(conv(x)), for whose backward x alone is kept: the convolution is done again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...]) -> Tensor:
        return _convolution(x, weight, bias, geometry, "swish")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.geometry = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        padding, stride, dilation, groups = ctx.geometry
        *wanted, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # second derivatives
            inputs = [t for t, asked in zip((x, weight, bias), wanted, strict=True) if asked]
            out = F.silu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))
            found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
            return (*(next(found) if asked else None for asked in wanted), None)
        grad = torch.ops.aten.silu_backward(grad, _convolution(x, weight, bias, ctx.geometry, "none"))
        gradients = torch.ops.aten.convolution_backward(
            *(grad, x, weight, None if bias is None else list(bias.shape), stride, padding, dilation),
            *(False, [0, 0], groups, wanted),
        )
        return (*(g if asked else None for g, asked in zip(gradients, wanted, strict=True)), None)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], activation: str
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, activation, [], "")


def convolved_silu(x: Tensor, conv: nn.Module) -> Tensor:
    """SiLU(conv(x)), (B, H, W, D) → (B, H, W, D), by one call of oneDNN where that is to be had."""
    images = x.permute(0, 3, 1, 2)
    known = isinstance(conv, nn.Conv2d) and _untouched(conv, nn.Conv2d) and conv.padding_mode == "zeros"
    if not known or not isinstance(conv, nn.Conv2d) or isinstance(conv.padding, str):
        return F.silu(conv(images).permute(0, 2, 3, 1))
    dtype = _direct_type(x, conv.weight)
    geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
    if torch.is_grad_enabled() and dtype == torch.float32:
        return _ConvolvedSilu.apply(images, conv.weight, conv.bias, geometry).permute(0, 2, 3, 1)
    if torch.is_grad_enabled() or dtype is None:
        return F.silu(conv(images).permute(0, 2, 3, 1))
    bias = None if conv.bias is None else conv.bias.to(dtype)
    with torch.autocast("cpu", enabled=False):
        joined = _convolution(images.to(dtype), conv.weight.to(dtype), bias, geometry, "swish")
    return joined.permute(0, 2, 3, 1)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that is a product over patches where it gives few pixels; channels last, without dilation.

    oneDNN's convolution of many channels takes as long for one image of 14×14 as for eight.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript prunes this branch, not an `and`)
            if self._is_small(x):
                return self._as_product(x)
        return self._conv_forward(x, self.weight, self.bias)

    def _is_small(self, x: Tensor) -> bool:
        return (
            not torch.is_grad_enabled()
            and _is_direct(x, self.weight)
            and x.ndim == 4
            and x.shape[1] == self.in_channels >= 128
            and x.shape[0] * x.shape[2] * x.shape[3] <= _FEW * self.stride[0] * self.stride[1]
        )

    def _as_product(self, x: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        (top, left), (height, width) = self.padding, self.kernel_size
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
        patches = padded.unfold(1, height, self.stride[0]).unfold(2, width, self.stride[1])
        rows = patches.flatten(3)  # (B, H', W', C·kh·kw), the order of the weight
        return _product(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
