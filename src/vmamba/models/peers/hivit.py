"""HiViT: a hierarchical vision transformer with attention in its last stage alone (arXiv 2205.14949).

b batch, h height, w width, c channels, m heads, l = h·w positions of the last stage.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, NormMlpClassifierHead, PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.models.peers.staged import Staged
from vmamba.nn import MergeDownsample
from vmamba.nn.mlp import Mlp

PATCH, REDUCTIONS = 4, (4, 8, 16)
EPS = 1e-6
"""Of every layer norm, as the authors build the model."""


class Attention(nn.Module):
    """Self-attention with a bias for each relative position; (b, h, w, c) → (b, h, w, c)."""

    def __init__(self, dim: int, heads: int, size: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        height, width = size
        self.bias_table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1), heads, **dd))
        trunc_normal_(self.bias_table, std=0.02)
        index = relative_positions(height, width).to(self.bias_table.device)
        self.register_buffer("bias_index", index, persistent=False)

    def init_non_persistent_buffers(self, size: tuple[int, int]) -> None:
        """Compute the index again."""
        self.bias_index = relative_positions(*size).to(self.bias_table.device)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        qkv = (
            self.qkv(x)
            .reshape(batch, height * width, 3, self.heads, dim // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        q, k, v = qkv.unbind(0)
        bias = self.bias_table[self.bias_index].permute(2, 0, 1).unsqueeze(0).to(q.dtype)  # (1, m, l, l)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).reshape(batch, height, width, dim))


def relative_positions(height: int, width: int) -> Tensor:
    """Rows of the bias's table, (l, l): (row i - row j + h - 1)·(2w - 1) + column i - column j + w - 1."""
    positions = torch.arange(height * width)
    row, column = positions // width, positions % width
    rows = row[:, None] - row + height - 1
    return rows * (2 * width - 1) + column[:, None] - column + width - 1


class MlpBlock(nn.Module):
    """x + MLP(norm(x)), the block of the first two stages."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AttentionBlock(MlpBlock):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(
        self, dim: int, heads: int, size: tuple[int, int], mlp_ratio: float, drop_path: float, **dd: Any
    ) -> None:
        super().__init__(dim, mlp_ratio, drop_path, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = Attention(dim, heads, size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Positions(nn.Module):
    """x + a learnt embedding of each position, (1, h, w, c)."""

    def __init__(self, dim: int, size: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(1, *size, dim, **dd))
        trunc_normal_(self.embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding


class HiViT(Staged):
    """Patches of 4, two stages of MLPs, a stage of attention at stride 16; images of one size.

    Args:
        img_size: Side of the images, or (height, width), multiples of 16.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: Pooling of the head, as in timm; "" for none.
        embed_dim: Channels of the last stage; those before have a quarter and a half.
        depths: Blocks of each stage; one of the first two is two MLPs.
        num_heads: m.
        stem_mlp_ratio: Hidden width of the MLPs of the first two stages over the channels.
        mlp_ratio: That of the last stage.
        drop_path_rate: Stochastic depth, rising linearly from 0 over the blocks.
        drop_rate: Dropout before the classifier.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: The size is not a multiple of 16.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 384,
        depths: Sequence[int] = (1, 1, 10),
        num_heads: int = 6,
        stem_mlp_ratio: float = 3.0,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % REDUCTIONS[-1] or width % REDUCTIONS[-1] or min(height, width) < 1:
            raise ValueError(f"img_size: expected multiples of {REDUCTIONS[-1]}, got {height}x{width}")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = embed_dim
        self.size = height // REDUCTIONS[-1], width // REDUCTIONS[-1]
        dims = (embed_dim // 4, embed_dim // 2, embed_dim)
        self.patch_embed = PatchEmbed(
            (height, width), PATCH, in_chans, dims[0], nn.LayerNorm, flatten=False, output_fmt="NHWC", **dd
        )
        counts = [2 * depths[0], 2 * depths[1], depths[2]]
        rates = torch.linspace(0, drop_path_rate, sum(counts), device="cpu").tolist()
        stages: list[nn.Module] = []
        for i in range(2):
            blocks = [MlpBlock(dims[i], stem_mlp_ratio, rates.pop(0), **dd) for _ in range(counts[i])]
            merge = [MergeDownsample(dims[i - 1], dims[i], **dd)] if i else []
            stages.append(nn.Sequential(*merge, *blocks))
        attention = [
            AttentionBlock(embed_dim, num_heads, self.size, mlp_ratio, rates.pop(0), **dd)
            for _ in range(counts[2])
        ]
        first = [MergeDownsample(dims[1], embed_dim, **dd), Positions(embed_dim, self.size, **dd)]
        self.stages = nn.Sequential(*stages, nn.Sequential(*first, *attention))
        self.feature_info = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, REDUCTIONS, strict=True))
        ]
        self.norm = nn.Identity()  # the head has it, after the pooling
        self.head = NormMlpClassifierHead(
            embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer="layernorm2d", **dd
        )
        self.apply(_init_weights)

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Compute what a checkpoint does not hold."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.init_non_persistent_buffers(self.size)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Both kinds of embeddings of positions."""
        return {name for name, _ in self.named_parameters() if name.endswith(("embedding", "bias_table"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise learning rates."""
        blocks = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def embed(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def finish(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear) and not module.weight.is_meta:  # there it would only take time
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        module.eps = EPS


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: HiViT) -> dict[str, Tensor]:
    """The authors' checkpoint with our names; embeddings of positions are resampled to the model's size.

    The authors number all blocks and mergings in one list, and keep the index of the relative positions.
    """
    state: Mapping[str, Tensor] = state_dict.get("model", state_dict)
    if "absolute_pos_embed" not in state:
        return dict(state)
    own = model.state_dict()
    places = [f"stages.{i}.{j}" for i, stage in enumerate(model.stages) for j in range(len(stage))]  # type: ignore[arg-type]
    places.remove("stages.2.1")  # the embedding of the positions
    renamed = {}
    for name, value in state.items():
        if name.endswith("relative_position_index"):
            continue
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            name = f"{places[int(number)]}.{rest}" if int(number) < len(places) else name
        name = name.replace("relative_position_bias_table", "bias_table").replace("fc_norm", "head.norm")
        if name == "absolute_pos_embed":
            name = "stages.2.1.embedding"
            side = round(value.shape[1] ** 0.5)
            value = resample_abs_pos_embed(value, list(model.size), [side, side], num_prefix_tokens=0)
            value = value.unflatten(1, model.size)
        if name.startswith("head.") and name in ("head.weight", "head.bias"):
            name = name.replace("head.", "head.fc.")
        if name.endswith("bias_table") and name in own and value.shape != own[name].shape:
            value = _resampled_biases(value, model.size)
        renamed[name] = value
    return renamed


def _resampled_biases(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A table for square images, for images of (h, w) positions."""
    side = round(len(table) ** 0.5)
    image = table.T.reshape(1, -1, side, side)
    larger = F.interpolate(image, (2 * size[0] - 1, 2 * size[1] - 1), mode="bicubic", align_corners=False)
    return larger[0].flatten(1).T


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2205.14949",
        "paper_name": "HiViT: Hierarchical Vision Transformer Meets Masked Image Modeling",
        "origin_url": "https://github.com/zhangxiaosong18/hivit",
    }


default_cfgs = generate_default_cfgs(
    {f"hivit_{size}.untrained": _cfg() for size in ("tiny", "small", "base")}
)


def _create(name: str, pretrained: bool, settings: dict[str, Any]) -> HiViT:
    return build_model_with_cfg(
        HiViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **settings,
    )


@register_model
def hivit_tiny(pretrained: bool = False, **kwargs: Any) -> HiViT:
    """HiViT-T: 19.2 M parameters."""
    settings = {"embed_dim": 384, "depths": (1, 1, 10), "num_heads": 6}
    return _create("hivit_tiny", pretrained, settings | kwargs)


@register_model
def hivit_small(pretrained: bool = False, **kwargs: Any) -> HiViT:
    """HiViT-S: 37.5 M parameters."""
    settings = {"embed_dim": 384, "depths": (2, 2, 20), "num_heads": 6}
    return _create("hivit_small", pretrained, settings | kwargs)


@register_model
def hivit_base(pretrained: bool = False, **kwargs: Any) -> HiViT:
    """HiViT-B: 66.4 M parameters."""
    settings = {"embed_dim": 512, "depths": (2, 2, 20), "num_heads": 8}
    return _create("hivit_base", pretrained, settings | kwargs)
