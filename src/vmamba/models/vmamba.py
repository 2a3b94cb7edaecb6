"""The VMamba backbone and its variants, under timm's model contract (arXiv 2401.10166, section 4).

B batch, H height, W width, C channels. Images come and feature maps go as (B, C, H, W); inside all is
(B, H, W, C).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, lecun_normal_, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vmamba.models.official import checkpoint_filter_fn, safe_globals
from vmamba.nn import ConvDownsample, ConvStem, MergeDownsample, PatchStem, VSSBlock

__all__ = ["VMamba", "VSSStage"]

_STEMS = {"conv": ConvStem, "patch": PatchStem}
_DOWNSAMPLES = {"conv": ConvDownsample, "merge": MergeDownsample}
_WEIGHT_INITS: dict[str, Callable[[Tensor], Any]] = {
    "normal": partial(trunc_normal_, std=0.02),
    "lecun": lecun_normal_,
}


class VSSStage(nn.Module):
    """A downsampling, except in the first stage, and VSS blocks; (B, H, W, C) → (B, H', W', C')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # noqa: SIM108  (TorchScript)
                x = checkpoint(block, x)
            else:
                x = block(x)
        return x


class VMamba(nn.Module):
    """VMamba: stem, four stages of VSS blocks, norm, head; (B, in_chans, H, W) → (B, num_classes).

    Any input size from 32×32 is taken, odd and non-square ones too.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: Pooling of the head, as in timm; "" for none.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        d_state: State size N of the scan.
        dt_rank: Rank R of delta; default ⌈C / 16⌉ of each stage.
        ssm_ratio: Channels inside SS2D over those outside.
        ssm_conv: Kernel size of the depthwise convolution before the scan; 0 leaves it out (its SiLU stays).
        ssm_conv_bias: Give that convolution a bias.
        ssm_init: "mamba", "rand" or "zero", see `vmamba.nn.SS2D`.
        gate: Gate SS2D's output by SiLU(z), as Mamba and the vanilla models do.
        routes: "cross", "unidirectional", "bidirectional", "cascade", or a tuple of routes (Table 5).
        mlp_ratio: Hidden width of the MLP over the channels; 0 for none, as in the vanilla models.
        stem: "conv" (two 3×3 convolutions) or "patch" (one over patches).
        stem_stride: Stride of the stem.
        downsample: "conv" (3×3, stride 2) or "merge" (patch merging), each with norm.
        drop_path_rate: Stochastic depth, rising linearly from 0 over the blocks.
        drop_rate: Dropout before the classifier.
        weight_init: Linear layers of the blocks truncated normal with a standard deviation of 0.02 ("normal",
            the authors') or of 1/√inputs ("lecun", from which narrow models learn faster).

    Raises:
        ValueError: An argument is out of range or unknown.
    """

    output_fmt = "NCHW"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (2, 2, 5, 2),
        dims: Sequence[int] = (96, 192, 384, 768),
        d_state: int = 1,
        dt_rank: int | None = None,
        ssm_ratio: float = 2.0,
        ssm_conv: int = 3,
        ssm_conv_bias: bool = False,
        ssm_init: str = "mamba",
        gate: bool = False,
        routes: str | tuple[str, ...] = "cross",
        mlp_ratio: float = 4.0,
        stem: str = "conv",
        stem_stride: int = 4,
        downsample: str = "conv",
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        weight_init: str = "normal",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(depths) != len(dims) or not depths or min(depths) < 1:
            raise ValueError(
                f"depths, dims: expected as many of one as of the other, and at least one block a stage, "
                f"got {tuple(depths)} and {tuple(dims)}"
            )
        if stem not in _STEMS:
            raise ValueError(f"stem: expected one of {', '.join(map(repr, _STEMS))}, got {stem!r}")
        if downsample not in _DOWNSAMPLES:
            raise ValueError(
                f"downsample: expected one of {', '.join(map(repr, _DOWNSAMPLES))}, got {downsample!r}"
            )
        if weight_init not in _WEIGHT_INITS:
            raise ValueError(
                f"weight_init: expected one of {', '.join(map(repr, _WEIGHT_INITS))}, got {weight_init!r}"
            )
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = dims[-1]

        self.stem = _STEMS[stem](in_chans, dims[0], stem_stride, **dd)
        drop_paths = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]
        stages = []
        feature_info: list[dict[str, Any]] = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            down = nn.Identity() if i == 0 else _DOWNSAMPLES[downsample](dims[i - 1], dim, **dd)
            blocks = [
                VSSBlock(
                    dim,
                    mlp_ratio=mlp_ratio,
                    drop_path=drop_paths[sum(depths[:i]) + j],
                    d_state=d_state,
                    dt_rank=dt_rank,
                    ssm_ratio=ssm_ratio,
                    ssm_conv=ssm_conv,
                    ssm_conv_bias=ssm_conv_bias,
                    ssm_init=ssm_init,
                    gate=gate,
                    routes=routes,
                    **dd,
                )
                for j in range(depth)
            ]
            stages.append(VSSStage(down, blocks))
            feature_info.append({"num_chs": dim, "reduction": stem_stride * 2**i, "module": f"stages.{i}"})
        self.feature_info = feature_info
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.drop_rate = drop_rate
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.stages.apply(partial(_init_weights, draw=_WEIGHT_INITS[weight_init]))
        self.head.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters of the recurrence: A_log, D and delta's bias."""
        return {
            name
            for name, _ in self.named_parameters()
            if name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for backward, and compute each block again there."""
        for stage in self.stages:
            cast(VSSStage, stage).grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier's linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier on, of the same device and type; 0 classes for none."""
        reference = next(self.stem.parameters())
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=self.global_pool,
            drop_rate=self.drop_rate,
            device=reference.device,
            dtype=reference.dtype,
        ).train(self.training)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.head.apply(_init_weights)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of the stages, (B, C, H, W) each, before the final norm.

        Args:
            x: (B, in_chans, H, W).
            indices: The last n stages if an int, all if None, else those of these indices.
            norm: Apply the final norm to the last stage's map.
            stop_early: Stop after the last stage asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediates and of the final features.
            intermediates_only: Leave the final features out.

        Returns:
            The maps, or the final features (as `forward_features`) and the maps.

        Raises:
            ValueError: `output_fmt` is unknown.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        last = len(self.stages) - 1
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        intermediates: list[Tensor] = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if stop_early and i > last_taken:
                break
            x = stage(x)
            if i in taken:
                feature = self.norm(x) if norm and i == last else x
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        if not stop_early or last_taken == last:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for these indices; returns them, resolved."""
        taken, last_taken = feature_take_indices(len(self.stages), indices)
        shortened = last_taken < len(self.stages) - 1
        self.stages = self.stages[: last_taken + 1]
        if shortened:
            self.num_features = self.feature_info[last_taken]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()  # type: ignore[assignment]  # it is sized for the last stage
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → the last feature map, normed, (B, C, H, W)."""
        return self.norm(self.stages(self.stem(x))).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A feature map (B, C, H, W) → logits (B, num_classes), or what the classifier takes."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module, draw: Callable[[Tensor], Any] = _WEIGHT_INITS["normal"]) -> None:
    """Linear layers' weights as `draw` does, their biases 0; all else as its layer draws it."""
    if isinstance(module, nn.Linear):
        draw(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"


def _cfg(release: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": f"{_RELEASES}/{release}" if release else "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "paper_ids": "arXiv:2401.10166",
        "paper_name": "VMamba: Visual State Space Model",
        "origin_url": "https://github.com/MzeroMiko/VMamba" if release else "",
        "license": "mit" if release else "",
        **kwargs,
    }


_SMALL_IMAGES: dict[str, Any] = {"input_size": (3, 32, 32), "pool_size": (2, 2), "crop_pct": 1.0}
_TINY_S2L5 = _cfg("%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth")
_SMALL_S2L15 = _cfg("%23v2cls/vssm_small_0229_ckpt_epoch_222.pth")
_BASE_S2L15 = _cfg("%23v2cls/vssm_base_0229_ckpt_epoch_237.pth")

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny.authors_in1k": _TINY_S2L5,
        "vmamba_tiny_s2l5.authors_in1k": _TINY_S2L5,
        "vmamba_small.authors_in1k": _SMALL_S2L15,
        "vmamba_small_s2l15.authors_in1k": _SMALL_S2L15,
        "vmamba_base.authors_in1k": _BASE_S2L15,
        "vmamba_base_s2l15.authors_in1k": _BASE_S2L15,
        "vmamba_tiny_s1l8.authors_in1k": _cfg("%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth"),
        "vmamba_small_s1l20.authors_in1k": _cfg("%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth"),
        "vmamba_base_s1l20.authors_in1k": _cfg("%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth"),
        "vanilla_vmamba_tiny.authors_in1k": _cfg("%2320240218/vssmtiny_dp01_ckpt_epoch_292.pth"),
        "vanilla_vmamba_small.authors_in1k": _cfg("%2320240218/vssmsmall_dp03_ckpt_epoch_238.pth"),
        "vanilla_vmamba_base.authors_in1k": _cfg("%2320240218/vssmbase_dp06_ckpt_epoch_241.pth"),
        "vmamba_tiny_v6.untrained": _cfg(),
        "vmamba_tiny_v7.untrained": _cfg(),
        "vmamba_tiny_v7_shallow.untrained": _cfg(),
        "vmamba_tiny_v8.untrained": _cfg(),
        "vmamba_large.untrained": _cfg(),
        "vmamba_nano.untrained": _cfg(**_SMALL_IMAGES),
        "vmamba_pico.untrained": _cfg(**_SMALL_IMAGES),
    }
)


_WIDE = (128, 256, 512, 1024)
_VANILLA: dict[str, Any] = {
    "d_state": 16,
    "gate": True,
    "ssm_conv_bias": True,
    "mlp_ratio": 0.0,
    "stem": "patch",
    "downsample": "merge",
}


_V6: dict[str, Any] = {"depths": (2, 2, 2, 2), "d_state": 16, "gate": True, "ssm_conv": 0}
_PICO: dict[str, Any] = {"dims": (24, 48, 96, 192), "depths": (1, 2, 4, 1), "stem_stride": 2}
_NANO: dict[str, Any] = {"dims": (48, 96, 192, 384), "depths": (2, 2, 4, 1), "stem_stride": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "vmamba_tiny_s2l5": {"depths": (2, 2, 5, 2)},
    "vmamba_small_s2l15": {"depths": (2, 2, 15, 2)},
    "vmamba_base_s2l15": {"depths": (2, 2, 15, 2), "dims": _WIDE},
    "vmamba_tiny_s1l8": {"depths": (2, 2, 8, 2), "ssm_ratio": 1.0},
    "vmamba_small_s1l20": {"depths": (2, 2, 20, 2), "ssm_ratio": 1.0},
    "vmamba_base_s1l20": {"depths": (2, 2, 20, 2), "dims": _WIDE, "ssm_ratio": 1.0},
    "vanilla_vmamba_tiny": {**_VANILLA, "depths": (2, 2, 9, 2)},
    "vanilla_vmamba_small": {**_VANILLA, "depths": (2, 2, 27, 2)},
    "vanilla_vmamba_base": {**_VANILLA, "depths": (2, 2, 27, 2), "dims": _WIDE},
    "vmamba_tiny_v6": _V6,
    "vmamba_tiny_v7": {**_V6, "depths": (2, 2, 5, 2), "ssm_ratio": 1.0},
    "vmamba_tiny_v7_shallow": {**_V6, "ssm_ratio": 1.0},
    "vmamba_tiny_v8": {**_V6, "depths": (2, 2, 5, 2), "ssm_ratio": 1.0, "gate": False},
    "vmamba_large": {"depths": (2, 2, 15, 2), "dims": (192, 384, 768, 1536)},
    "vmamba_nano": _NANO,
    "vmamba_pico": _PICO,
}
"""The arguments in which each variant differs from `VMamba`'s defaults."""

ALIASES = {
    "vmamba_tiny": "vmamba_tiny_s2l5",
    "vmamba_small": "vmamba_small_s2l15",
    "vmamba_base": "vmamba_base_s2l15",
}
"""The paper's names. Later versions of the paper, and the authors' README, call s1l8 VMamba-T."""


def _register(name: str, settings: dict[str, Any]) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> VMamba:
        # timm reads files with weights_only=True; the authors' hold a yacs config beside the weights.
        with safe_globals():
            return build_model_with_cfg(
                VMamba,
                name,
                pretrained,
                pretrained_filter_fn=checkpoint_filter_fn,
                feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
                **{**settings, **kwargs},
            )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"`VMamba` with {settings}."
    globals()[name] = register_model(create)


for _name, _settings in VARIANTS.items():
    _register(_name, _settings)
for _name, _variant in ALIASES.items():
    _register(_name, VARIANTS[_variant])
