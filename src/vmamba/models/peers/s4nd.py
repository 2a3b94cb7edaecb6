"""S4ND: state-space models as global convolutions of an image, in ConvNeXt and ViT (arXiv 2210.06583).

b batch, h height, w width, c channels, k kernels a channel, n pairs of conjugate states, l length of an axis.

Along each axis a diagonal state-space model (S4D, arXiv 2206.11893) gives a kernel for either direction; an
image's kernel is their outer product. The authors' code also has a low-rank term of the state matrix, with
which no checkpoint on ImageNet was released; it is left out here.
"""

import math
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

STATES = 64
"""Size of the state; half of it are the conjugates of the other half."""
STEM_KERNEL = 16
"""Longest lag of the kernels of the ConvNeXt's stem."""


def _wide(t: Tensor) -> Tensor:
    """In float32 at least: there are no Fourier transforms in half precision on a CPU."""
    return t if t.dtype == torch.float64 else t.float()


class Kernel(nn.Module):
    """The response to an impulse, K_t = 2 Re Σ_n C_n (exp(ΔA_n) - 1) / A_n · exp(ΔA_n)^t, t < l: (k, c, l).

    Args:
        dim: c.
        kernels: k.
        steps: Least and largest step size Δ.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, kernels: int, steps: tuple[float, float], **dd: Any) -> None:
        super().__init__()
        n = STATES // 2
        self.steps = steps
        self.C = nn.Parameter(torch.empty(kernels, dim, n, 2, **dd))  # real and imaginary parts
        self.log_dt = nn.Parameter(torch.empty(dim, **dd))
        self.log_A_real = nn.Parameter(torch.empty(n, **dd))
        self.A_imag = nn.Parameter(torch.empty(n, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A_n = -1/2 + iπn, whose basis is Fourier's; Δ log-uniform; C normal."""
        if self.C.is_meta:
            return
        nn.init.normal_(self.C, std=0.5**0.5)
        nn.init.uniform_(self.log_dt, math.log(self.steps[0]), math.log(self.steps[1]))
        nn.init.constant_(self.log_A_real, math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(len(self.A_imag), device=self.A_imag.device))

    def discrete(self) -> tuple[Tensor, Tensor]:
        """ΔA, the logarithm of the factor from step to step, (c, n), and C times the input's (k, c, n)."""
        A = torch.complex(-_wide(self.log_A_real).exp(), _wide(self.A_imag))
        exponent = _wide(self.log_dt).exp().unsqueeze(1) * A
        C = _wide(self.C)
        return exponent, torch.complex(C[..., 0], C[..., 1]) * (exponent.exp() - 1) / A

    def forward(self, length: int) -> Tensor:
        exponent, drive = self.discrete()
        times = torch.arange(length, device=exponent.device)
        powers = (exponent.unsqueeze(2) * times).exp()  # (c, n, l)
        return 2 * torch.einsum("kcn,cnl->kcl", drive, powers).real


@register_notrace_module  # it looks at types
class S4ND(nn.Module):
    """A convolution with a kernel as large as the image, and D x; (b, c, h, w) → (b, k·c, h, w), by FFTs.

    Along each axis the kernel of lags t ≥ 0 is one state-space model's and that of t < 0 another's.

    Args:
        dim: c.
        channels: k; the first c outputs are of the first kernel of each channel.
        out_channels: Sum over the channels to so many outputs instead; then there is no D.
        longest: Most lags of the kernel along each axis; 0 for the image's side.
        steps: See `Kernel`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: The input has another number of channels.
    """

    def __init__(
        self,
        dim: int,
        channels: int = 1,
        out_channels: int = 0,
        longest: int = 0,
        steps: tuple[float, float] = (0.1, 1.0),
        **dd: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.longest = longest
        self.mixes = out_channels > 0
        kernels = 2 * (out_channels or channels)
        self.column = Kernel(dim, kernels, steps, **dd)
        self.row = Kernel(dim, kernels, steps, **dd)
        self.D = None if self.mixes else nn.Parameter(torch.empty(channels, dim, **dd))
        if self.D is not None and not self.D.is_meta:
            nn.init.normal_(self.D)

    def lags(self, length: int) -> int:
        """How many lags the kernel has along an axis."""
        return length if self.longest == 0 else min(length, self.longest)

    def circle(self, kernel: Tensor, length: int) -> Tensor:
        """(2k, c, lags), lags t ≥ 0 and t < 0, → (k, c, lags + length), those of t < 0 at the end."""
        after, before = kernel.chunk(2, dim=0)
        return F.pad(after, (0, length)) + F.pad(before.flip(2), (length, 0))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.dim:  # the products below would broadcast
            raise ValueError(f"x: expected {self.dim} channels, got {x.shape[1]}")
        height, width = x.shape[2], x.shape[3]
        column = self.circle(self.column(self.lags(height)), height)
        row = self.circle(self.row(self.lags(width)), width)
        size = [column.shape[2], row.shape[2]]
        wide = _wide(x)
        image = torch.fft.rfft2(wide, size)
        spectrum = torch.fft.fft(column).unsqueeze(3) * torch.fft.rfft(row).unsqueeze(2)  # (k, c, ·, ·)
        if self.mixes:
            y = torch.einsum("bchw,kchw->bkhw", image, spectrum)
        else:
            y = (image.unsqueeze(1) * spectrum).flatten(1, 2)
        y = torch.fft.irfft2(y, size)[:, :, :height, :width]
        if self.D is not None:
            y = y + (self.D.to(wide.dtype)[:, :, None, None] * wide.unsqueeze(1)).flatten(1, 2)
        return y.to(x.dtype)


class S4NDStem(nn.Module):
    """S4ND to 32 channels, mean over patches of 4, linear layer with GLU, norm."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = S4ND(in_chans, out_channels=32, longest=STEM_KERNEL, **dd)
        self.pool = nn.AvgPool2d(4)
        self.fc = nn.Conv2d(32, 2 * dim, 1, **dd)
        self.norm = LayerNorm2d(dim, **dd)
        _init_linear(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.glu(self.fc(self.pool(self.conv(x))), dim=1))


class S4NDMixer(nn.Module):
    """In the place of a ViT's attention: S4ND with two kernels a channel, GELU, linear layer with GLU.

    Args:
        dim: c.
        grid: (h, w) of the patches.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, dim: int, grid: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.height, self.width = grid
        self.conv = S4ND(dim, channels=2, steps=(0.001, 0.1), **dd)
        self.fc = nn.Linear(2 * dim, 2 * dim, **dd)
        _init_linear(self.fc)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, _, dim = x.shape
        image = x.transpose(1, 2).reshape(batch, dim, self.height, self.width)
        return F.glu(self.fc(F.gelu(self.conv(image)).flatten(2).transpose(1, 2)), dim=-1)


def _init_linear(layer: nn.Linear | nn.Conv2d) -> None:
    if layer.weight.is_meta:
        return
    trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _without_decay(model: nn.Module) -> set[str]:
    ends = ("C", "D", "log_dt", "log_A_real", "A_imag")
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, Kernel | S4ND)
        for name, _ in module.named_parameters(recurse=False)
        if name in ends
    }


class S4NDConvNeXt(ConvNeXt):
    """ConvNeXt with S4ND for the stem and for every depthwise convolution; arguments as timm's `ConvNeXt`."""

    def __init__(self, in_chans: int = 3, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        super().__init__(in_chans, device=device, dtype=dtype, **kwargs)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        feature_info: Any = self.feature_info
        self.stem: nn.Module = S4NDStem(in_chans, feature_info[0]["num_chs"], **dd)  # type: ignore[assignment]
        for block in (block for stage in self.stages for block in stage.blocks):  # type: ignore[union-attr]
            block.conv_dw = S4ND(block.conv_dw.in_channels, **dd)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters of the state-space models."""
        return _without_decay(self)


class S4NDViT(VisionTransformer):
    """ViT with S4ND for every attention, no class token and no positions; arguments as timm's
    `VisionTransformer`.

    Raises:
        ValueError: `img_size` is not a multiple of `patch_size`: pixels at the edges would be left out.
    """

    def __init__(self, device: Any = None, dtype: Any = None, **kwargs: Any) -> None:
        fixed = {"class_token": False, "pos_embed": "none", "fc_norm": False}
        super().__init__(device=device, dtype=dtype, **({"global_pool": "avg"} | kwargs | fixed))
        height, width = self.patch_embed.img_size
        patch_height, patch_width = self.patch_embed.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"img_size: expected multiples of {patch_height}x{patch_width}, got {height}x{width}"
            )
        for block in self.blocks:
            block.attn = S4NDMixer(self.embed_dim, self.patch_embed.grid_size, device=device, dtype=dtype)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters of the state-space models."""
        return _without_decay(self)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "paper_ids": "arXiv:2210.06583",
        "paper_name": "S4ND: Modeling Images and Videos as Multidimensional Signals Using State Spaces",
        "origin_url": "https://github.com/state-spaces/s4",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "s4nd_convnext_tiny.untrained": _cfg(pool_size=(7, 7), first_conv=(), classifier="head.fc"),
        "s4nd_vit_base.untrained": _cfg(
            pool_size=None, fixed_input_size=True, first_conv="patch_embed.proj", classifier="head"
        ),
    }
)


@register_model
def s4nd_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> S4NDConvNeXt:
    """S4ND-ConvNeXt-T: 30.0 M parameters."""
    settings: dict[str, Any] = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
    return build_model_with_cfg(
        S4NDConvNeXt,
        "s4nd_convnext_tiny",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **(settings | kwargs),
    )


@register_model
def s4nd_vit_base(pretrained: bool = False, **kwargs: Any) -> S4NDViT:
    """S4ND-ViT-B: 91.2 M real parameters; with each complex one counted once, the paper's 88.8 M."""
    settings: dict[str, Any] = {"patch_size": 16, "embed_dim": 768, "depth": 12}
    return build_model_with_cfg(
        S4NDViT,
        "s4nd_vit_base",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(settings | kwargs),
    )
