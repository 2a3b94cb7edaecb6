"""The VMamba backbone and its variants, under timm's model contract (arXiv 2401.10166, section 4).

b batch, h height, w width, c channels. Images come and feature maps go as (b, c, h, w); inside all is
(b, h, w, c).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, lecun_normal_, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn

from vmamba.models.official import checkpoint_filter_fn, safe_globals
from vmamba.nn import SS2D, ConvDownsample, ConvStem, MergeDownsample, PatchStem, SS2DConfig, VSSBlock

__all__ = ["FeatureMaps", "VMamba", "VMambaConfig", "VSSStage"]

_STEMS = {"conv": ConvStem, "patch": PatchStem}
_DOWNSAMPLES = {"conv": ConvDownsample, "merge": MergeDownsample}
_WEIGHT_INITS: dict[str, Callable[[Tensor], Any]] = {
    "normal": partial(trunc_normal_, std=0.02),
    "lecun": lecun_normal_,
}


class VSSStage(nn.Module):
    """A downsampling, except in the first stage, and VSS blocks; (b, h, w, c) → (b, h', w', c')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


@dataclass(frozen=True)
class VMambaConfig:
    """The settings of a `VMamba` except those of its input and classifier, named like its arguments.

    Raises:
        ValueError: A value is out of range or unknown.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    ss2d: SS2DConfig
    mlp_ratio: float
    stem: str
    stem_stride: int
    downsample: str
    drop_path_rate: float
    drop_rate: float
    weight_init: str
    output_stride: int

    def __post_init__(self) -> None:
        if len(self.depths) != len(self.dims) or not self.depths or min(self.depths) < 1:
            raise ValueError(
                f"depths, dims: expected as many of one as of the other, and at least one block a stage, "
                f"got {self.depths} and {self.dims}"
            )
        for name, choices in (("stem", _STEMS), ("downsample", _DOWNSAMPLES), ("weight_init", _WEIGHT_INITS)):
            if getattr(self, name) not in choices:
                expected = ", ".join(map(repr, choices))
                raise ValueError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        if self.output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride: expected 8, 16 or 32, got {self.output_stride}")

    def arguments(self) -> dict[str, Any]:
        """The same as keyword arguments of `VMamba`."""
        arguments = {**vars(self), **vars(self.ss2d)}
        del arguments["ss2d"], arguments["ssm_conv_dilation"]  # the latter follows from output_stride
        return arguments

    def stages(self) -> Iterator[tuple[int, int, int]]:
        """For each stage: the stride and the dilation of its downsampling, and the dilation of its blocks.

        A downsampling that would exceed `output_stride` keeps the size. The dilation of the convolutions
        after it is doubled instead, so that their receptive fields stay the same.
        """
        total, dilation = self.stem_stride, 1
        yield 1, 1, 1
        for _ in self.depths[1:]:
            if total < self.output_stride:
                total *= 2
                yield 2, dilation, dilation
            else:
                yield 1, dilation, 2 * dilation
                dilation *= 2

    def reductions(self) -> list[int]:
        """Size of the image over that of each stage's feature map."""
        strides = [stride for stride, _, _ in self.stages()]
        return [self.stem_stride * math.prod(strides[: i + 1]) for i in range(len(strides))]


class VMamba(nn.Module):
    """VMamba: stem, four stages of VSS blocks, norm, head; (b, in_chans, h, w) → (b, num_classes).

    Any input size from 32×32 on works, odd and non-square ones too.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes of the head; 0 for none.
        global_pool: Pooling of the head, as in timm; "" for none.
        depths: Blocks of each stage.
        dims: Channels of each stage.
        d_state: State size n of the scan.
        dt_rank: Rank r of delta; default ⌈c / 16⌉ of each stage.
        ssm_ratio: Channels inside SS2D over those outside.
        ssm_conv: Kernel size of the depthwise convolution before the scan; 0 leaves it out (its SiLU stays).
        ssm_conv_bias: Give that convolution a bias.
        ssm_init: "mamba", "rand" or "zero", see `vmamba.nn.SS2D`.
        gate: Gate SS2D's output by SiLU(z), as Mamba and the vanilla models do.
        routes: "cross", "unidirectional", "bidirectional", "cascade" (Table 5), "snake", "diagonal",
            "window:7" or "atrous:2" of any size, or a tuple of routes, see `vmamba.ops.selective_scan_2d`.
        split_channels: Read only a part of the channels along each route.
        mlp_ratio: Hidden width of the MLP over the channels; 0 for none, as in the vanilla models.
        stem: "conv" (two 3×3 convolutions) or "patch" (one over patches).
        stem_stride: Stride of the stem.
        downsample: "conv" (3×3, stride 2) or "merge" (patch merging), each with norm.
        drop_path_rate: Stochastic depth, rising linearly from 0 over the blocks.
        drop_rate: Dropout before the classifier.
        weight_init: Linear layers of the blocks truncated normal with a standard deviation of 0.02 ("normal",
            the authors') or of 1/√inputs ("lecun", from which narrow models learn faster).
        output_stride: 32, or 16 or 8 for dense prediction: the image is at most so many times as large as a
            feature map; later stages keep the size, and their convolutions are dilated instead.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        config: The settings, except those of input and classifier.

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
        split_channels: bool = False,
        mlp_ratio: float = 4.0,
        stem: str = "conv",
        stem_stride: int = 4,
        downsample: str = "conv",
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        weight_init: str = "normal",
        output_stride: int = 32,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ss2d = SS2DConfig(
            d_state=d_state,
            dt_rank=dt_rank,
            ssm_ratio=ssm_ratio,
            ssm_conv=ssm_conv,
            ssm_conv_bias=ssm_conv_bias,
            ssm_init=ssm_init,
            gate=gate,
            routes=routes,
            split_channels=split_channels,
        )
        self.config = VMambaConfig(
            depths=tuple(depths),
            dims=tuple(dims),
            ss2d=ss2d,
            mlp_ratio=mlp_ratio,
            stem=stem,
            stem_stride=stem_stride,
            downsample=downsample,
            drop_path_rate=drop_path_rate,
            drop_rate=drop_rate,
            weight_init=weight_init,
            output_stride=output_stride,
        )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = dims[-1]
        self.drop_rate = drop_rate
        feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"}
            for i, (dim, reduction) in enumerate(zip(dims, self.config.reductions(), strict=True))
        ]
        self.feature_info = feature_info  # annotated above: TorchScript warns of an annotated attribute
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.stem = _STEMS[stem](in_chans, dims[0], stem_stride, **dd)
        self.stages = nn.Sequential(*_stages(self.config, **dd))
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        self.stages.apply(partial(_init_weights, draw=_WEIGHT_INITS[weight_init]))
        self.head.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters of the recurrence: A_log, D and delta's bias of each layer."""
        return {
            f"{path}.{name}"
            for path, layer in self.named_modules()
            if isinstance(layer, SS2D)
            for name in layer.no_weight_decay()
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
        """Keep only the blocks' inputs for backward, and recompute each block there."""
        for module in self.modules():
            if isinstance(module, VSSBlock):
                module.grad_checkpointing = enable

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
        """The feature maps of the stages, (b, c, h, w) each, before the final norm.

        Args:
            x: (b, in_chans, h, w).
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
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates: list[Tensor] = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if stop_early and i > max_index:
                break
            x = stage(x)
            if i in take_indices:
                feature = self.norm(x) if norm and i == last else x
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        if not stop_early or max_index == last:
            x = self.norm(x)
        return x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for these indices; returns them, resolved."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if shortened:
            self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_norm or shortened:
            self.norm = nn.Identity()  # type: ignore[assignment]  # it is sized for the last stage
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) → the last feature map, normed, (b, c, h, w)."""
        return self.norm(self.stages(self.stem(x))).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A feature map (b, c, h, w) → logits (b, num_classes), or what the classifier takes."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _stages(config: VMambaConfig, **dd: Any) -> Iterator[VSSStage]:
    """The stages; drop path rises linearly from 0 over all blocks."""
    blocks, last = 0, max(1, sum(config.depths) - 1)
    for i, (stride, dilation, dilation_inside) in enumerate(config.stages()):
        dim = config.dims[i]
        downsample = (
            _DOWNSAMPLES[config.downsample](config.dims[i - 1], dim, stride, dilation, **dd)
            if i > 0
            else nn.Identity()
        )
        ss2d = replace(config.ss2d, ssm_conv_dilation=dilation_inside)
        rates = [config.drop_path_rate * (blocks + j) / last for j in range(config.depths[i])]
        blocks += config.depths[i]
        yield VSSStage(
            downsample,
            [VSSBlock(dim, ss2d, mlp_ratio=config.mlp_ratio, drop_path=rate, **dd) for rate in rates],
        )


def _init_weights(module: nn.Module, draw: Callable[[Tensor], Any] = _WEIGHT_INITS["normal"]) -> None:
    """Initialise a linear layer's weight by `draw` and its bias to 0; other layers initialise themselves."""
    if isinstance(module, nn.Linear) and not module.weight.is_meta:  # there it would only take time
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


PACKAGED = Path(__file__).with_name("packaged")
"""The folder of the weights that come with the package; `tools/package_weights.py` writes them."""

_SMALL_IMAGES: dict[str, Any] = {"input_size": (3, 32, 32), "pool_size": (2, 2), "crop_pct": 1.0}
_CIFAR10 = _cfg(
    file=str(PACKAGED / "vmamba_pico_wide.cifar10.safetensors"),
    num_classes=10,
    label_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    input_size=(3, 32, 32),
    pool_size=(4, 4),
    crop_pct=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    license="apache-2.0",
)
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
        "vmamba_pico_wide.cifar10": _CIFAR10,
    }
)


class FeatureMaps(FeatureGetterNet):
    """What `features_only=True` gives: the model, returning the stages' feature maps.

    timm's own wrapper forwards neither `set_grad_checkpointing` nor `no_weight_decay`.
    """

    model: VMamba

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the model."""
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """As of the model, by the names that the parameters have here."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}


def _create(name: str, pretrained: bool, settings: dict[str, Any]) -> VMamba:
    """Build a variant under its registered name, with its pretrained weights if asked for."""
    stages = len(settings["depths"])
    # timm reads files with weights_only=True; the authors' hold a yacs config beside the weights.
    with safe_globals():
        return build_model_with_cfg(
            VMamba,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg={"out_indices": tuple(range(stages)), "feature_cls": FeatureMaps},
            **settings,
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


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T of this version of the paper: 30.7 M parameters, 4.86 GMACs at 224²."""
    settings = {"depths": (2, 2, 5, 2)}
    return _create("vmamba_tiny_s2l5", pretrained, settings | kwargs)


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The paper's VMamba-T: `vmamba_tiny_s2l5`. Later versions of the paper call `vmamba_tiny_s1l8` so."""
    settings = {"depths": (2, 2, 5, 2)}
    return _create("vmamba_tiny", pretrained, settings | kwargs)


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S of this version of the paper: 50.1 M parameters, 8.72 GMACs at 224²."""
    settings = {"depths": (2, 2, 15, 2)}
    return _create("vmamba_small_s2l15", pretrained, settings | kwargs)


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The paper's VMamba-S: `vmamba_small_s2l15`."""
    settings = {"depths": (2, 2, 15, 2)}
    return _create("vmamba_small", pretrained, settings | kwargs)


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B of this version of the paper: 88.6 M parameters, 15.36 GMACs at 224²."""
    settings = {"depths": (2, 2, 15, 2), "dims": _WIDE}
    return _create("vmamba_base_s2l15", pretrained, settings | kwargs)


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The paper's VMamba-B: `vmamba_base_s2l15`."""
    settings = {"depths": (2, 2, 15, 2), "dims": _WIDE}
    return _create("vmamba_base", pretrained, settings | kwargs)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Deeper and narrower inside than s2l5; VMamba-T of the paper's later versions."""
    settings = {"depths": (2, 2, 8, 2), "ssm_ratio": 1.0}
    return _create("vmamba_tiny_s1l8", pretrained, settings | kwargs)


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Deeper and narrower inside than s2l15; VMamba-S of the paper's later versions."""
    settings = {"depths": (2, 2, 20, 2), "ssm_ratio": 1.0}
    return _create("vmamba_small_s1l20", pretrained, settings | kwargs)


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Deeper and narrower inside than s2l15; VMamba-B of the paper's later versions."""
    settings = {"depths": (2, 2, 20, 2), "dims": _WIDE, "ssm_ratio": 1.0}
    return _create("vmamba_base_s1l20", pretrained, settings | kwargs)


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-T, steps V0 to V5 of Figure 9: gated, without MLP."""
    settings = _VANILLA | {"depths": (2, 2, 9, 2)}
    return _create("vanilla_vmamba_tiny", pretrained, settings | kwargs)


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-S: gated, without MLP."""
    settings = _VANILLA | {"depths": (2, 2, 27, 2)}
    return _create("vanilla_vmamba_small", pretrained, settings | kwargs)


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-B: gated, without MLP."""
    settings = _VANILLA | {"depths": (2, 2, 27, 2), "dims": _WIDE}
    return _create("vanilla_vmamba_base", pretrained, settings | kwargs)


@register_model
def vmamba_tiny_v6(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Step V6 of Figure 9: MLP and new stem; gated, without the depthwise convolution."""
    settings = {"depths": (2, 2, 2, 2), "d_state": 16, "gate": True, "ssm_conv": 0}
    return _create("vmamba_tiny_v6", pretrained, settings | kwargs)


@register_model
def vmamba_tiny_v7(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Step V7 of Figure 9: V6 narrower inside and deeper."""
    settings = {"depths": (2, 2, 5, 2), "d_state": 16, "gate": True, "ssm_conv": 0, "ssm_ratio": 1.0}
    return _create("vmamba_tiny_v7", pretrained, settings | kwargs)


@register_model
def vmamba_tiny_v7_shallow(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """V6 narrower inside at the same depth."""
    settings = {"depths": (2, 2, 2, 2), "d_state": 16, "gate": True, "ssm_conv": 0, "ssm_ratio": 1.0}
    return _create("vmamba_tiny_v7_shallow", pretrained, settings | kwargs)


@register_model
def vmamba_tiny_v8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Step V8 of Figure 9: V7 without the gate."""
    settings = {"depths": (2, 2, 5, 2), "d_state": 16, "ssm_conv": 0, "ssm_ratio": 1.0}
    return _create("vmamba_tiny_v8", pretrained, settings | kwargs)


@register_model
def vmamba_large(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Our choice for the large model that the paper announces."""
    settings = {"depths": (2, 2, 15, 2), "dims": (192, 384, 768, 1536)}
    return _create("vmamba_large", pretrained, settings | kwargs)


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """At most 6 M parameters, for images of 32 to 64 pixels and CPUs."""
    settings = {"depths": (2, 2, 4, 1), "dims": (48, 96, 192, 384), "stem_stride": 2}
    return _create("vmamba_nano", pretrained, settings | kwargs)


@register_model
def vmamba_pico(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """At most 1.5 M parameters, for images of 32 to 64 pixels and CPUs."""
    settings = {"depths": (1, 2, 4, 1), "dims": (24, 48, 96, 192), "stem_stride": 2}
    return _create("vmamba_pico", pretrained, settings | kwargs)


@register_model
def vmamba_pico_wide(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """1.9 M parameters in three wide stages, for images of 32 pixels; its weights come with the package."""
    settings = {
        "depths": (1, 2, 2),
        "dims": (64, 128, 256),
        "ssm_ratio": 1.0,
        "mlp_ratio": 3.0,
        "stem_stride": 2,
        "weight_init": "lecun",
    }
    return _create("vmamba_pico_wide", pretrained, settings | kwargs)


ALIASES = {
    "vmamba_tiny": "vmamba_tiny_s2l5",
    "vmamba_small": "vmamba_small_s2l15",
    "vmamba_base": "vmamba_base_s2l15",
}
"""The paper's names, each with the variant that it stands for."""
