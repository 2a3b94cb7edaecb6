"""UPerNet with an auxiliary FCN head, with the mathematics and the names of mmseg (arXiv 1807.10221).

b batch, c channels, h height, w width, k classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.heads.features import Features, backbone_names
from vmamba.heads.peers import create_backbone
from vmamba.labels import IGNORED


class ConvModule(nn.Module):
    """Convolution, BatchNorm, ReLU; keeps the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Head(nn.Module):
    """What both heads end with: dropout of whole channels, and a classifier of each position."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor) -> Tensor:
        """(b, c, h, w) → logits (b, k, h, w)."""
        return self.conv_seg(self.dropout(x))


class UPerHead(Head):
    """Pyramid pooling of the last map, then a feature pyramid of all: logits at the first map's size.

    Args:
        inputs: Channels of each map, the finest first.
        num_classes: Classes.
        channels: Channels inside.
        dropout: Rate before the classifier.
        pool_scales: Sides to which the last map is pooled.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        num_classes: int,
        channels: int = 512,
        dropout: float = 0.1,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        super().__init__(channels, num_classes, dropout)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(inputs[-1], channels, 1))
            for scale in pool_scales
        )
        self.bottleneck = ConvModule(inputs[-1] + len(pool_scales) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(dim, channels, 1) for dim in inputs[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in inputs[:-1])
        self.fpn_bottleneck = ConvModule(len(inputs) * channels, channels, 3)

    def pool(self, x: Tensor) -> Tensor:
        """(b, c, h, w) and its pooled forms → (b, channels, h, w)."""
        pooled = [resize(module(x), x.shape[2:]) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], 1))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.pool(maps[-1]))
        for i in reversed(range(1, len(levels))):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels[:-1], strict=True)]
        outputs.append(levels[-1])
        size = outputs[0].shape[2:]
        return self.classify(self.fpn_bottleneck(torch.cat([resize(x, size) for x in outputs], 1)))


class FCNHead(Head):
    """A convolution and a classifier on one map."""

    def __init__(self, inputs: int, num_classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__(channels, num_classes, dropout)
        self.convs = nn.Sequential(ConvModule(inputs, channels, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.convs(x))


class UPerNet(nn.Module):
    """A backbone with UPerNet's head and, while training, an FCN head on the last map but one.

    Called with images (b, in_chans, h, w) it gives logits (b, k, h, w); with labels (b, h, w) as well, it
    gives the losses "decode.loss_ce" and "aux.loss_ce", of which the latter is weighted already.

    Args:
        backbone: From images to maps, with their numbers of channels as `channels`.
        decode_head: From maps to logits.
        auxiliary_head: From the last map but one to logits.
        aux_weight: Of the auxiliary loss.
    """

    def __init__(
        self,
        backbone: nn.Module,
        decode_head: UPerHead,
        auxiliary_head: FCNHead,
        aux_weight: float = 0.4,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self.aux_weight = aux_weight

    @property
    def num_classes(self) -> int:
        """Classes of the logits."""
        return self.decode_head.conv_seg.out_channels

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        maps, size = self.backbone(images), images.shape[2:]
        if labels is None:
            return upsample(self.decode_head(maps), size)
        if labels.shape != (len(images), *size):
            raise ValueError(f"labels: expected {(len(images), *size)}, got {tuple(labels.shape)}")
        pools = self.decode_head.psp_modules.modules()
        if len(images) == 1 and any(type(m) is nn.BatchNorm2d and m.training for m in pools):
            raise ValueError(
                "images: BatchNorm trains on at least two of them, since the pyramid pools each to one "
                "position; take larger batches, or SyncBatchNorm on several devices"
            )
        return {
            "decode.loss_ce": cross_entropy(upsample(self.decode_head(maps), size), labels),
            "aux.loss_ce": self.aux_weight
            * cross_entropy(upsample(self.auxiliary_head(maps[-2]), size), labels),
        }

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The layers that depend on the number of classes; `load_weights(…, classifier="new")` keeps them."""
        return self.decode_head.conv_seg, self.auxiliary_head.conv_seg

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the backbone."""
        self.backbone.set_grad_checkpointing(enable)  # type: ignore[operator]

    def convert_names(self, weights: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
        """Weights under mmseg's names or ours → under those here, for `load_weights`.

        Args:
            weights: With the prefix "backbone." on the backbone's.
            shapes: Of this model's weights.
        """
        if not isinstance(self.backbone, Features):
            return dict(weights)
        converted = {name: weight for name, weight in weights.items() if not name.startswith("backbone.")}
        inside = self.backbone.convert_names(_of_backbone(weights), _of_backbone(shapes))
        return {**converted, **{f"backbone.{name}": weight for name, weight in inside.items()}}


def upernet(
    backbone: str | nn.Module,
    num_classes: int = 150,
    *,
    channels: int = 512,
    aux_channels: int = 256,
    aux_weight: float = 0.4,
    dropout: float = 0.1,
    **features: Any,
) -> UPerNet:
    """UPerNet on any backbone, with the paper's settings.

    Args:
        backbone: The name of a model of timm's, ours among them, or of one of `vmamba.heads.peers`; or a
            module such as `Features`.
        num_classes: Classes, without the ignored one.
        channels: Channels of the head.
        aux_channels: Channels of the auxiliary head.
        aux_weight: Of its loss.
        dropout: Before the classifiers.
        features: For a backbone given by its name, what `Features.create` takes: `checkpoint`, `pretrained`,
            `norm`, and arguments of the model such as `drop_path_rate`.

    Raises:
        ModelError: There is no such model or argument, or it has no maps at the strides 4 to 32.
        CheckpointError: The backbone's weights cannot be read, or do not fit.
        TypeError: There are arguments for a backbone that is made already.
    """
    if isinstance(backbone, str):
        backbone = create_backbone(backbone, **features)
    elif features:
        raise TypeError(f"the backbone is made already and takes no {', '.join(features)}")
    inputs: Any = backbone.channels
    return UPerNet(
        backbone,
        UPerHead(inputs, num_classes, channels, dropout),
        FCNHead(inputs[-2], num_classes, aux_channels, dropout),
        aux_weight,
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """mmseg's mean cross-entropy: the sum over pixels that are not ignored, over the number of all pixels.

    Args:
        logits: (b, k, h, w).
        labels: (b, h, w); `IGNORED` where there is no class.
    """
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """(b, c, h, w) → (b, c, *size), bilinear, without aligned corners."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits at the image's size, in float32 at least: in half precision close classes would become equal."""
    return resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), size)


def mmseg_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a `UPerNet` under mmseg's names; those of a VMamba get its authors' names and shapes.

    With `torch.save({"state_dict": mmseg_names(model.state_dict())}, file)` their code reads them.
    """
    heads = {name: weight for name, weight in state_dict.items() if not name.startswith("backbone.")}
    inside = backbone_names(_of_backbone(state_dict))
    return {**{f"backbone.{name}": weight for name, weight in inside.items()}, **heads}


def _of_backbone(names: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix("backbone."): value for name, value in names.items() if name.startswith("backbone.")
    }
