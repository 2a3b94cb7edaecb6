"""From the image to the first stage, and from stage to stage.

b batch, h height, w width, c channels. Convolutions see a channels-last view of (b, h, w, c), without a copy.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.nn.layer import Layer


def channels_last(x: Tensor) -> Tensor:
    """(b, c, h, w) in channels-last memory; vmap refuses `x.contiguous(memory_format=...)`."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


class ConvStem(Layer):
    """Two 3×3 convolutions, each with norm, GELU between; (b, c, h, w) → (b, h', w', dim).

    Args:
        in_chans: Channels of the image.
        dim: Channels of the first stage; half as many after the first convolution.
        stride: 1, 2 or 4 in all; h' = ⌈h / stride⌉.

    Raises:
        ValueError: `stride` is none of these.
    """

    images = True

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int = 4,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_chans
        if stride not in (1, 2, 4):
            raise ValueError(f"stem_stride: expected 1, 2 or 4 for the stem 'conv', got {stride}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, stride=2 if stride > 1 else 1, padding=1, **dd)
        self.norm1 = nn.LayerNorm(dim // 2, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2 if stride > 2 else 1, padding=1, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)  # the last copy: from here all is channels last
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchStem(Layer):
    """One convolution over patches of stride × stride, then norm; (b, c, h, w) → (b, h', w', dim).

    Args:
        in_chans: Channels of the image.
        dim: Channels of the first stage.
        stride: Side of a patch; h' = ⌊h / stride⌋.

    Raises:
        ValueError: `stride` is less than 1.
    """

    images = True

    def __init__(
        self,
        in_chans: int,
        dim: int,
        stride: int = 4,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_chans
        if stride < 1:
            raise ValueError(f"stem_stride: expected at least 1, got {stride}")
        self.conv1 = nn.Conv2d(in_chans, dim, stride, stride=stride, device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        return self.norm1(self.conv1(x).permute(0, 2, 3, 1))


class ConvDownsample(Layer):
    """3×3 convolution of stride 2, then norm; (b, h, w, c) → (b, ⌈h / 2⌉, ⌈w / 2⌉, out_dim).

    Args:
        dim: c.
        out_dim: Channels of the next stage.
        stride: 2, or 1 to keep the size, as an `output_stride` asks for.
        dilation: Of the convolution.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        stride: int = 2,
        dilation: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = dim
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(dim, out_dim, 3, stride, padding=dilation, dilation=dilation, **dd)
        self.norm = nn.LayerNorm(out_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class MergeDownsample(Layer):
    """Patch merging: gather 2×2, norm, linear; (b, h, w, c) → (b, ⌈h / 2⌉, ⌈w / 2⌉, out_dim).

    Images are padded with zeros at the right and bottom, where the last patch needs it. The four pixels
    follow each other in the channels as (0,0), (1,0), (0,1), (1,1), row first.

    Args:
        dim: c.
        out_dim: Channels of the next stage.
        stride: Step from patch to patch: 2, or 1 to keep the size, as an `output_stride` asks for.
        dilation: Step from pixel to pixel of a patch.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        stride: int = 2,
        dilation: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = dim
        self.stride, self.dilation = stride, dilation
        self.norm = nn.LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(self.gather(x)))

    def gather(self, x: Tensor) -> Tensor:
        """(b, h, w, c) → the pixels of each patch, (b, ⌈h/stride⌉, ⌈w/stride⌉, 4c)."""
        if self.stride == 1:
            return self._gather_overlapping(x)
        batch, height, width, dim = x.shape
        half_height, half_width = (height + 1) // 2, (width + 1) // 2
        x = F.pad(x, (0, 0, 0, 2 * half_width - width, 0, 2 * half_height - height))
        x = x.reshape(batch, half_height, 2, half_width, 2, dim)
        return x.permute(0, 1, 3, 4, 2, 5).reshape(batch, half_height, half_width, 4 * dim)

    def _gather_overlapping(self, x: Tensor) -> Tensor:
        """`gather` at stride 1."""
        height, width, step = x.shape[1], x.shape[2], self.dilation
        x = F.pad(x, (0, 0, 0, step, 0, step))
        upper, lower = x[:, :height], x[:, step:]
        corners = [upper[:, :, :width], lower[:, :, :width], upper[:, :, step:], lower[:, :, step:]]
        return torch.cat(corners, dim=-1)
