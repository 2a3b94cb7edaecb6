"""Vim: a sequence of patches read in two directions by Mamba's scan (Zhu et al., arXiv 2401.09417).

b batch, l tokens of the sequence, c channels outside, d = 2·c channels inside, n state size, r rank of delta.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.models.peers.staged import Staged
from vmamba.nn.ss2d import at_least_float32, scan_along
from vmamba.ops.routes import route_codes

PATCH, KERNEL, EPS = 16, 4, 1e-5

torch.fx.wrap("at_least_float32")  # as in vmamba.nn.ss2d


class Direction(nn.Module):
    """Convolution over the tokens before, SiLU, and the selective scan; (b, l, d) → (b, l, d) in float32.

    Args:
        inner: d.
        n_state: n.
        rank: r.
        reverse: From the last token to the first, so that the tokens after take the place of those before.
    """

    routes: list[int]
    splits: list[int]

    def __init__(self, inner: int, n_state: int, rank: int, reverse: bool, **dd: Any) -> None:
        super().__init__()
        self.reverse = reverse
        self.before = KERNEL - 1
        self.routes = route_codes(("row_reversed" if reverse else "row",))
        self.splits = [rank, n_state, n_state]
        self.conv1d = nn.Conv1d(inner, inner, KERNEL, groups=inner, **dd)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False, **dd)
        self.dt_proj = nn.Linear(rank, inner, **dd)
        self.A_log = nn.Parameter(torch.empty(inner, n_state, **dd))
        self.D = nn.Parameter(torch.ones(inner, **dd))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As Mamba's: A = -(1 … n), and softplus(bias of delta) log-uniform in [1e-3, 0.1]."""
        if self.A_log.is_meta:
            return
        rank = self.dt_proj.in_features
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        nn.init.uniform_(self.dt_proj.bias, math.log(1e-3), math.log(0.1))
        dt = self.dt_proj.bias.exp().clamp_(min=1e-4)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_log.copy_(torch.arange(1, self.A_log.shape[1] + 1, device=self.A_log.device).log())

    def forward(self, x: Tensor) -> Tensor:
        u = x.transpose(1, 2)
        if self.reverse:
            u = F.conv1d(
                F.pad(u, (0, self.before)), self.conv1d.weight.flip(2), self.conv1d.bias, groups=u.shape[1]
            )
        else:
            u = self.conv1d(F.pad(u, (self.before, 0)))
        u = F.silu(u).transpose(1, 2).unsqueeze(1)  # an image of height 1, (b, 1, l, d)
        delta, B, C = self.x_proj(u).unsqueeze(3).split(self.splits, dim=-1)
        A = -torch.exp(at_least_float32(self.A_log)).unsqueeze(0)
        D, bias, weight = (
            self.D.unsqueeze(0),
            self.dt_proj.bias.unsqueeze(0),
            self.dt_proj.weight.unsqueeze(0),
        )
        return scan_along(self.routes, u, delta, A, B, C, D, bias, weight).squeeze(1)


class VimBlock(nn.Module):
    """x + mixer(norm(x)): half the sum of both directions, gated; (b, l, c) → (b, l, c)."""

    def __init__(self, dim: int, n_state: int, drop_path: float, **dd: Any) -> None:
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.norm = nn.RMSNorm(dim, EPS, **dd)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False, **dd)
        self.forwards = Direction(inner, n_state, rank, reverse=False, **dd)
        self.backwards = Direction(inner, n_state, rank, reverse=True, **dd)
        self.out_proj = nn.Linear(inner, dim, bias=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)
        y = (self.forwards(u) + self.backwards(u)) * (0.5 * F.silu(z))
        return x + self.drop_path(self.out_proj(y.to(u.dtype)))


class VimHead(nn.Module):
    """The class token, or the mean over patches, and a linear layer; (b, l, c) → (b, num_classes)."""

    def __init__(self, dim: int, num_classes: int, pool_type: str, drop_rate: float, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.drop = nn.Dropout(drop_rate)
        self.pool_type = ""
        self.reset(num_classes, pool_type, **dd)

    def reset(self, num_classes: int, pool_type: str | None = None, **dd: Any) -> None:
        """A new classifier; `pool_type` "token", "avg" or "" for none.

        Raises:
            ValueError: `pool_type` is unknown.
        """
        if pool_type is not None:
            if pool_type not in ("token", "avg", ""):
                raise ValueError(f"global_pool: expected 'token', 'avg' or '', got {pool_type!r}")
            self.pool_type = pool_type
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            self.fc = layer = nn.Linear(self.dim, num_classes, **dd)
            trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        middle = x.shape[1] // 2
        if self.pool_type == "token":
            x = x[:, middle]
        elif self.pool_type == "avg":
            x = (x.sum(1) - x[:, middle]) / (x.shape[1] - 1)
        x = self.drop(x)
        return x if pre_logits else self.fc(x)


class Vim(Staged):
    """Patches of 16 and a class token in their middle, through blocks of one width; images of one size.

    Args:
        img_size: Side of the images, or (height, width), multiples of 16.
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: "token" for the class token, "avg" for the mean over patches, "" for none.
        embed_dim: c.
        depth: Number of blocks.
        d_state: n.
        drop_path_rate: Stochastic depth, rising linearly from 0 over the blocks.
        drop_rate: Dropout before the classifier.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: The size is not a multiple of 16, or `global_pool` is unknown.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % PATCH or width % PATCH or min(height, width) < 1:
            raise ValueError(f"img_size: expected multiples of {PATCH}, got {height}x{width}")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grid = height // PATCH, width // PATCH
        self.patch_embed = PatchEmbed((height, width), PATCH, in_chans, embed_dim, **dd)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + 1, embed_dim, **dd))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.stages = nn.Sequential(*(VimBlock(embed_dim, d_state, rate, **dd) for rate in rates))
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": PATCH, "module": f"stages.{i}"} for i in range(depth)
        ]
        self.norm = nn.RMSNorm(embed_dim, EPS, **dd)
        self.head = VimHead(embed_dim, num_classes, global_pool, drop_rate, **dd)
        self._init_weights()

    def _init_weights(self) -> None:
        for parameter in (self.cls_token, self.pos_embed):
            trunc_normal_(parameter, std=0.02)
        for block in self.stages:
            assert isinstance(block, VimBlock)
            for direction in (block.forwards, block.backwards):
                direction.reset_parameters()
            with torch.no_grad():  # so that the sum over the blocks stays of one size
                block.out_proj.weight.div_(math.sqrt(len(self.stages)))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Embeddings, and the parameters of the recurrence: A_log, D and delta's bias."""
        ends = ("cls_token", "pos_embed", "A_log", ".D", "dt_proj.bias")
        return {name for name, _ in self.named_parameters() if name.endswith(ends)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))],
        }

    def embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        middle = x.shape[1] // 2
        token = self.cls_token.expand(x.shape[0], -1, -1)
        return torch.cat((x[:, :middle], token, x[:, middle:]), dim=1) + self.pos_embed

    def as_map(self, x: Tensor) -> Tensor:
        middle = x.shape[1] // 2
        patches = torch.cat((x[:, :middle], x[:, middle + 1 :]), dim=1)
        return patches.reshape(x.shape[0], self.grid[0], self.grid[1], x.shape[2])

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Vim) -> dict[str, Tensor]:
    """The authors' checkpoint with our names; the positions' embedding is resampled to the model's size.

    The authors name the second direction by "_b": `conv1d_b`, `A_b_log`.
    """
    state: Mapping[str, Tensor] = state_dict.get("model", state_dict)
    if "norm_f.weight" not in state:
        return dict(state)
    renamed = {}
    for name, value in state.items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            rest = rest.removeprefix("mixer.")
            parameter, *more = rest.split(".")
            if parameter in ("conv1d", "x_proj", "dt_proj", "A_log", "D"):
                rest = f"forwards.{rest}"
            elif "_b" in parameter:
                rest = ".".join(("backwards", parameter.replace("_b", "", 1), *more))
            name = f"stages.{number}.{rest}"
        name = {
            "norm_f.weight": "norm.weight",
            "head.weight": "head.fc.weight",
            "head.bias": "head.fc.bias",
        }.get(name, name)
        if name == "pos_embed" and value.shape != model.pos_embed.shape:
            value = _resampled_positions(value, model.grid)
        renamed[name] = value
    return renamed


def _resampled_positions(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """(1, l, c) for square images, the class token's in the middle, for images of another grid."""
    middle = embedding.shape[1] // 2
    side = math.isqrt(embedding.shape[1] - 1)
    patches = torch.cat((embedding[:, :middle], embedding[:, middle + 1 :]), dim=1)
    patches = resample_abs_pos_embed(patches, list(grid), [side, side], num_prefix_tokens=0)
    half = patches.shape[1] // 2
    return torch.cat((patches[:, :half], embedding[:, middle : middle + 1], patches[:, half:]), dim=1)


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2401.09417",
        "paper_name": "Vision Mamba",
        "origin_url": "https://github.com/hustvl/Vim",
    }


default_cfgs = generate_default_cfgs({f"vim_{size}.untrained": _cfg() for size in ("tiny", "small")})


def _create(name: str, pretrained: bool, settings: dict[str, Any]) -> Vim:
    depth = settings.get("depth", 24)
    return build_model_with_cfg(
        Vim,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": tuple(range(depth))[-3:], "feature_cls": "getter"},
        **settings,
    )


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti: 7.1 M parameters."""
    return _create("vim_tiny", pretrained, {"embed_dim": 192} | kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S: 25.8 M parameters."""
    return _create("vim_small", pretrained, {"embed_dim": 384} | kwargs)
