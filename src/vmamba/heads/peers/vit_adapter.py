"""ViT-Adapter: a plain vision transformer beside a small convolutional network (arXiv 2205.08534).

The two exchange what they compute by deformable attention: before each quarter of the blocks the transformer
receives from the pyramid (`Injector`), after it the pyramid receives from the transformer (`Extractor`).

b batch, c channels, h height, w width, q queries, m heads, d channels of a head, p points.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers import DropPath, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vmamba.heads.features import STRIDES
from vmamba.models.factory import create_model

Size = tuple[int, int]
"""Height and width of a map."""

INTERACTIONS = 4
HEADS = 6
POINTS = 4
"""Points of a map that a query looks at with each head."""
WINDOW = 14
"""Side of the windows in which two of three blocks attend, in patches."""
PRIOR = 64
"""Channels of the convolutional network's first map."""


class DeformableAttention(nn.Module):
    """Each query mixes the values at a few points around its place, which it chooses itself.

    Args:
        dim: Channels.
        levels: Maps that hold the values.
    """

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.sampling_offsets = nn.Linear(dim, HEADS * levels * POINTS * 2)
        self.attention_weights = nn.Linear(dim, HEADS * levels * POINTS)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each head looks in a direction of its own, at points 1 to p positions away, all equally."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
        angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
        directions = torch.stack([angles.cos(), angles.sin()], dim=1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)
        offsets = directions[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
        self.sampling_offsets.bias.copy_(offsets.expand(-1, self.levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, places: Tensor, values: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Mixed values, (b, q, c).

        Args:
            queries: (b, q, c).
            places: (q, 2), x and y of each query in 0 … 1.
            values: (b, sum of h·w, c), the levels one after another.
            sizes: Of the levels.
        """
        batch, count, _ = queries.shape
        shape = batch, count, HEADS, self.levels, POINTS
        offsets = self.sampling_offsets(queries).reshape(*shape, 2)
        weights = self.attention_weights(queries).reshape(*shape[:3], -1).softmax(dim=-1).reshape(shape)
        maps = self.value_proj(values).split([height * width for height, width in sizes], dim=1)
        mixed = queries.new_zeros(())
        for level, (values_here, (height, width)) in enumerate(zip(maps, sizes, strict=True)):
            points = places[:, None, None] + offsets[:, :, :, level] / offsets.new_tensor([width, height])
            grid = (2 * points - 1).transpose(1, 2).flatten(0, 1)  # (b·m, q, p, 2), in -1 … 1
            image = values_here.unflatten(2, (HEADS, -1)).permute(0, 2, 3, 1).flatten(0, 1)  # (b·m, d, h·w)
            samples = F.grid_sample(image.unflatten(2, (height, width)), grid, align_corners=False)
            weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (b·m, q, p)
            mixed = mixed + (samples * weight[:, None]).sum(dim=-1)  # (b·m, d, q)
        return self.output_proj(mixed.reshape(batch, -1, count).transpose(1, 2))


class Injector(nn.Module):
    """Adds to the transformer's tokens what they find in the pyramid, at first nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, levels=3)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, pyramid: Tensor, places: Tensor, sizes: Sequence[Size]) -> Tensor:
        return x + self.gamma * self.attn(self.query_norm(x), places, self.feat_norm(pyramid), sizes)


class Extractor(nn.Module):
    """Adds to the pyramid what it finds in the transformer's tokens, then an MLP with a convolution."""

    def __init__(self, dim: int, drop_path: float) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, levels=1)
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, dim // 4)
        self.dwconv = nn.Conv2d(dim // 4, dim // 4, 3, padding=1, groups=dim // 4)
        self.fc2 = nn.Linear(dim // 4, dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, pyramid: Tensor, x: Tensor, places: Tensor, sizes: Sequence[Size]) -> Tensor:
        size = sizes[1]  # of the transformer's map, at stride 16
        pyramid = pyramid + self.attn(self.query_norm(pyramid), places, self.feat_norm(x), [size])
        hidden = [self.dwconv(level) for level in as_maps(self.fc1(self.ffn_norm(pyramid)), sizes)]
        return pyramid + self.drop_path(self.fc2(F.gelu(as_tokens(hidden))))


class SpatialPrior(nn.Module):
    """The convolutional network: maps (b, dim, h / s, w / s) at s = 4, 8, 16, 32."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        first = [*_conv(in_chans, PRIOR, 2), *_conv(PRIOR, PRIOR, 1), *_conv(PRIOR, PRIOR, 1)]
        self.stem = nn.Sequential(*first, nn.MaxPool2d(3, stride=2, padding=1))
        widths = (PRIOR, 2 * PRIOR, 4 * PRIOR, 4 * PRIOR)
        self.convs = nn.ModuleList(nn.Sequential(*_conv(*pair, 2)) for pair in pairwise(widths))
        self.projections = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in widths)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.stem(images)]
        for conv in self.convs:
            maps.append(conv(maps[-1]))
        return [projection(x) for projection, x in zip(self.projections, maps, strict=True)]


def _conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


class ViTAdapter(nn.Module):
    """(b, in_chans, h, w) → maps (b, c, h / s, w / s) at s = 4, 8, 16, 32, padded so that 32 divides them.

    Args:
        name: Of a vision transformer of timm's with patches of 16 pixels.
        drop_path_rate: Stochastic depth, rising linearly from 0 over the blocks.
        in_chans: Channels of the image.
        args: Other arguments of the transformer.

    Attributes:
        model: The transformer, without class token, last norm and classifier.
        channels: Channels of each map.
        strides: Size of the image over that of each map.
    """

    strides = STRIDES

    def __init__(self, name: str, *, drop_path_rate: float = 0.0, in_chans: int = 3, **args: Any) -> None:
        super().__init__()
        bare = {"num_classes": 0, "class_token": False, "global_pool": "avg", "final_norm": False}
        args = {**bare, "init_values": 1.0, "drop_path_rate": drop_path_rate, "in_chans": in_chans, **args}
        self.model = create_model(name, **args)
        dim = self.model.embed_dim
        self.channels = (dim,) * len(STRIDES)
        self.grad_checkpointing = False
        self.spm = SpatialPrior(in_chans, dim)
        self.level_embed = nn.Parameter(torch.randn(3, dim))
        self.injectors = nn.ModuleList(Injector(dim) for _ in range(INTERACTIONS))
        self.extractors = nn.ModuleList(  # two more after the last blocks
            Extractor(dim, drop_path_rate) for _ in range(INTERACTIONS + 2)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(dim) for _ in STRIDES)

    def forward(self, images: Tensor) -> list[Tensor]:
        images = F.pad(images, [0, -images.shape[3] % 32, 0, -images.shape[2] % 32])
        sizes = [(images.shape[2] // stride, images.shape[3] // stride) for stride in STRIDES[1:]]
        finest, *maps = self.spm(images)
        embeds = self.level_embed[:, :, None, None]
        pyramid = as_tokens([level + embed for level, embed in zip(maps, embeds, strict=True)])
        x = as_tokens([self.model.patch_embed.proj(images)])
        x = x + resample_abs_pos_embed(self.model.pos_embed, sizes[1], num_prefix_tokens=0, antialias=False)
        for i in range(INTERACTIONS):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, pyramid = checkpoint(self._interact, i, x, pyramid, sizes, use_reentrant=False)
            else:
                x, pyramid = self._interact(i, x, pyramid, sizes)
        maps = as_maps(pyramid, sizes)
        maps = [self.up(maps[0]) + finest, *maps]
        (tokens,) = as_maps(x, sizes[1:2])
        resized = [
            F.interpolate(tokens, size=level.shape[2:], mode="bilinear", align_corners=False)
            for level in maps
        ]
        return [norm(a + b) for norm, a, b in zip(self.norms, maps, resized, strict=True)]

    def _interact(self, i: int, x: Tensor, pyramid: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, Tensor]:
        """A quarter of the blocks, with what is exchanged before and after."""
        x = self.injectors[i](x, pyramid, places(sizes[1:2], x), sizes)
        step = len(self.model.blocks) // INTERACTIONS
        for j in range(i * step, (i + 1) * step):
            block = self.model.blocks[j]
            x = block(x) if j % 3 == 2 else in_windows(block, x, sizes[1])
        everywhere = places(sizes, x)
        more = 2 if i == INTERACTIONS - 1 else 0
        for extractor in self.extractors[i : i + 1 + more]:
            pyramid = extractor(pyramid, x, everywhere, sizes)
        return x, pyramid

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep less for backward, and recompute it there."""
        self.grad_checkpointing = enable


def in_windows(block: Any, x: Tensor, size: Size) -> Tensor:
    """A block of timm's vision transformer, with attention only among the tokens of a window.

    Args:
        block: The block.
        x: (b, h·w, c).
        size: Height and width.
    """
    x = x + block.drop_path1(block.ls1(_windowed(block.attn, block.norm1(x), size)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _windowed(attention: Any, x: Tensor, size: Size) -> Tensor:
    height, width = size
    qkv = attention.qkv(x).unflatten(1, size)
    qkv = F.pad(qkv, [0, 0, 0, -width % WINDOW, 0, -height % WINDOW])
    grid = qkv.shape[1] // WINDOW, qkv.shape[2] // WINDOW
    windows = qkv.unflatten(2, (grid[1], WINDOW)).unflatten(1, (grid[0], WINDOW)).transpose(2, 3)
    windows = windows.flatten(3, 4).flatten(0, 2)  # (b·windows, tokens of one, 3·c)
    q, k, v = windows.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    mixed = mixed.unflatten(1, (WINDOW, WINDOW)).unflatten(0, (len(x), *grid)).transpose(2, 3)
    return attention.proj(mixed.flatten(3, 4).flatten(1, 2)[:, :height, :width].flatten(1, 2))


def as_tokens(maps: Sequence[Tensor]) -> Tensor:
    """Maps (b, c, h, w), one after another as (b, sum of h·w, c)."""
    return torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2)


def as_maps(tokens: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """The maps (b, c, h, w) of `as_tokens`."""
    levels = tokens.transpose(1, 2).split([height * width for height, width in sizes], dim=2)
    return [level.unflatten(2, size) for level, size in zip(levels, sizes, strict=True)]


def places(sizes: Sequence[Size], like: Tensor) -> Tensor:
    """The centres of all positions of these maps, one after another: x and y in 0 … 1, (sum of h·w, 2)."""
    centres = []
    for height, width in sizes:
        y, x = (
            (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side
            for side in (height, width)
        )
        centres.append(torch.cartesian_prod(y, x).flip(1))
    return torch.cat(centres)
