"""From the image to the first stage, and from stage to stage.

B batch, H height, W width, C channels. Convolutions see a channels-last view of (B, H, W, C), without a copy.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.nn.linear import Conv2d, Linear
from vmamba.nn.parts import goes_in_parts, in_groups


class ConvStem(nn.Module):
    """Two 3×3 convolutions, each with norm, GELU between; (B, C, H, W) → (B, H', W', dim).

    Args:
        in_chans: Channels of the image.
        dim: Channels of the first stage; half as many after the first convolution.
        stride: 1, 2 or 4 in all; H' = ⌈H / stride⌉.

    Raises:
        ValueError: `stride` is none of these.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int = 4,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stride not in (1, 2, 4):
            raise ValueError(f"stem_stride: expected 1, 2 or 4 for the stem 'conv', got {stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2 if stride > 1 else 1, padding=1, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2 if stride > 2 else 1, padding=1, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript prunes this branch, not an `and`)
            if goes_in_parts(self, x):
                return in_groups(
                    self._embed,
                    x,
                    x.numel() // x.shape[1] // self.conv1.stride[0] ** 2 * self.norm1.weight.numel(),
                )
        return self._embed(x)

    def _embed(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # the last copy: from here all is channels last
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchStem(nn.Module):
    """One convolution over patches of stride × stride, then norm; (B, C, H, W) → (B, H', W', dim).

    Args:
        in_chans: Channels of the image.
        dim: Channels of the first stage.
        stride: Side of a patch; H' = ⌊H / stride⌋.

    Raises:
        ValueError: `stride` is less than 1.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int = 4,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"stem_stride: expected at least 1, got {stride}")
        self.conv1 = nn.Conv2d(in_chans, dim, stride, stride=stride, device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """3×3 convolution of stride 2, then norm; (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, out_dim)."""

    def __init__(
        self, dim: int, out_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.conv = Conv2d(dim, out_dim, 3, stride=2, padding=1, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class MergeDownsample(nn.Module):
    """Patch merging: gather 2×2, norm, linear; (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, out_dim).

    Odd sizes are padded with zeros at the right and bottom. The four pixels follow each other in the channels
    as (0,0), (1,0), (0,1), (1,1), row first.
    """

    def __init__(
        self, dim: int, out_dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = Linear(4 * dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        half_height, half_width = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * half_width - width, 0, 2 * half_height - height))
        x = x.reshape(batch, half_height, 2, half_width, 2, dim)
        x = x.permute(0, 1, 3, 4, 2, 5).reshape(batch, half_height, half_width, 4 * dim)
        return self.reduction(self.norm(x))
