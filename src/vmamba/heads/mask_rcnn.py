"""Mask R-CNN on any backbone: torchvision's classes, computing what mmdet's Mask R-CNN computes.

What torchvision does differently is said where its parts are replaced: anchors, box coding and matching in
`boxes`, the order of proposals in `proposals`, the cutting of regions in `regions`, masks in `masks`, sizes
in `resizing`.

b batch, n objects, h height, w width.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import faster_rcnn, generalized_rcnn
from torchvision.models.detection import mask_rcnn as torchvision_mask_rcnn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from vmamba.heads.boxes import STRIDES
from vmamba.heads.masks import paste_masks
from vmamba.heads.names import from_mmdet
from vmamba.heads.peers import create_backbone
from vmamba.heads.proposals import ProposalNetwork
from vmamba.heads.regions import RegionHeads
from vmamba.heads.resizing import Resize
from vmamba.models.official import convert_names

_BODY = "backbone.body."
"""Where the backbone's names begin in a detector."""


@dataclass(frozen=True)
class MaskRCNNConfig:
    """The settings of `mask_rcnn`; the defaults are mmdet's and the paper's.

    Attributes:
        num_classes: With the background, which is class 0.
        channels: Of the pyramid and the heads.
        hidden: Width of the box head.
        min_size: Pixels of the image's shorter side, or several, of which training draws one for each image
            and evaluation takes the last.
        max_size: Pixels of its longer side at most.
        resize_in_training: Resize images to those sizes when training too; otherwise they are expected at
            their final size.
        mean: Of the image's channels in 0 … 1.
        std: Their deviation.
        proposals: At most so many regions of an image go to the heads.
        samples: So many of them, of an image, the heads train on, at most a quarter of them on objects.
        detections: At most so many objects of an image are returned.
        score_threshold: Objects of a lower probability are not returned.

    Raises:
        ValueError: A value is out of range.
    """

    num_classes: int = 81
    channels: int = 256
    hidden: int = 1024
    min_size: int | Sequence[int] = 800
    max_size: int = 1333
    resize_in_training: bool = True
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    proposals: int = 1000
    samples: int = 512
    detections: int = 100
    score_threshold: float = 0.05

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(
                f"num_classes: expected at least 2, the background counts as one; got {self.num_classes}"
            )
        for name in ("channels", "hidden", "max_size", "proposals", "samples", "detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        sizes = [self.min_size] if isinstance(self.min_size, int) else list(self.min_size)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"min_size: expected one or several sizes from 1 on, got {self.min_size!r}")


def mask_rcnn(backbone: str | nn.Module, num_classes: int = 81, **settings: Any) -> "MaskRCNN":
    """Mask R-CNN with a feature pyramid on a backbone, with new weights in the heads.

    Args:
        backbone: The name of a model of timm's, ours among them, or of one of `vmamba.heads.peers`; or a
            module that takes images (b, 3, h, w) and returns a list of four maps (b, c, h', w') at strides 4,
            8, 16 and 32, such as `vmamba.heads.Features`. It names their channels as `channels`, or by
            `feature_info.channels()` as timm's feature extractors do.
        num_classes: With the background: 81 for COCO.
        settings: The other fields of `MaskRCNNConfig`.

    Raises:
        ModelError: There is no model of that name, or it has no maps at these strides.
        TypeError: The backbone does not name its channels, or a setting is unknown.
        ValueError: The backbone has other maps than these, or a setting is out of range.
    """
    if isinstance(backbone, str):
        backbone = create_backbone(backbone)
    return MaskRCNN(backbone, MaskRCNNConfig(num_classes=num_classes, **settings))


class MaskRCNN(generalized_rcnn.GeneralizedRCNN):
    """The detector; use it as torchvision's.

    In training mode `model(images, targets)` returns a dict of losses: `loss_objectness`, `loss_rpn_box_reg`,
    `loss_classifier`, `loss_box_reg` and `loss_mask`. In evaluation mode `model(images)` returns for each
    image a dict of `boxes` (n, 4), `labels` (n,) from 1 on, `scores` (n,) from the highest on, and `masks`
    (n, 1, h, w), probabilities to compare with 0.5; all in the image's own frame.

    Images are a list of float tensors (3, h, w) with values in 0 … 1, of any sizes. Targets are dicts of
    `boxes` (n, 4), float, as (x1, y1, x2, y2) in pixels; `labels` (n,), int64, from 1 on; and `masks`
    (n, h, w) with 0 and 1. n may be 0.

    Args:
        backbone: As for `mask_rcnn`.
        config: The settings.
    """

    def __init__(self, backbone: nn.Module, config: MaskRCNNConfig) -> None:
        body = Pyramid(backbone, config.channels)
        heads = _heads(config)
        super().__init__(
            body,
            ProposalNetwork(config.channels, config.proposals),
            RegionHeads(heads, config.score_threshold, config.detections, config.samples),
            Resize(config.min_size, config.max_size, config.mean, config.std, config.resize_in_training),
        )
        self.config = config
        _initialise(body.fpn, heads)

    def forward(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        *,
        paste: bool = True,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training mode, detections in evaluation mode; see the class.

        Args:
            images: See the class.
            targets: See the class.
            paste: Give masks of the images' sizes, which of many objects take gigabytes; otherwise those of
                the boxes, (n, 1, m, m), for `vmamba.heads.masks.paste_masks`.

        Raises:
            ValueError: An image or target is not of the form above; the message names it by its index.
        """
        _check_images(images)
        if self.training:
            if targets is None or len(targets) != len(images):
                count = "none" if targets is None else len(targets)
                raise ValueError(f"targets: expected one for each of {len(images)} images, got {count}")
            for index, (image, target) in enumerate(zip(images, targets, strict=True)):
                _check_target(index, target, image, self.config.num_classes)
        result: dict[str, Tensor] | list[dict[str, Tensor]] = super().forward(
            list(images), targets if self.training else None
        )
        if paste and not isinstance(result, dict):
            for each, image in zip(result, images, strict=True):
                height, width = image.shape[-2:]
                each["masks"] = paste_masks(each["masks"], each["boxes"], (height, width))
        return result

    def convert_names(self, weights: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
        """Weights under mmdet's names → under this model's, for `load_weights`; ours pass as they are.

        Args:
            weights: The backbone's may have its own names or, of a VMamba, its authors'.
            shapes: Of this model's weights.
        """
        named = from_mmdet(weights)
        body, body_shapes = _below(_BODY, named), _below(_BODY, shapes)
        convert = getattr(self.backbone.body, "convert_names", convert_names)
        converted = {_BODY + name: weight for name, weight in convert(body, body_shapes).items()}
        return {**converted, **{name: named[name] for name in named if not name.startswith(_BODY)}}

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The layers that depend on the number of classes; `load_weights(…, classifier="new")` keeps them."""
        boxes, masks = self.roi_heads.box_predictor, self.roi_heads.mask_predictor
        return boxes.cls_score, boxes.bbox_pred, masks.mask_fcn_logits

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the backbone: keep less for backward, and recompute it there."""
        self.backbone.body.set_grad_checkpointing(enable)


@contextmanager
def recorded_logits(model: Any) -> Iterator[list[Tensor]]:
    """A list that gets the classes' logits (n, k) of the proposals of each pass through a detector inside.

    Where they are NaN, or there are none at all, outputs of the layers before are not finite: every anchor
    is a proposal unless its place is NaN. The detections alone would look like those of an empty image.
    """
    logits: list[Tensor] = []
    hook = model.roi_heads.box_predictor.register_forward_hook(
        lambda _module, _args, output: logits.append(output[0])
    )
    try:
        yield logits
    finally:
        hook.remove()


class Pyramid(nn.Module):
    """A backbone and the feature pyramid on its four maps; five levels of equal channels come out.

    Args:
        body: As for `mask_rcnn`.
        channels: Of each level.

    Raises:
        TypeError: The body does not name its channels.
        ValueError: It does not have four maps at strides 4, 8, 16 and 32.
    """

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.channels = _channels(body)
        self.out_channels = channels
        self.body = body
        self.fpn = FeaturePyramidNetwork(list(self.channels), channels, LastLevelMaxPool())

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Images (b, 3, h, w) → levels "0" to "3" and "pool" at strides 4 to 64."""
        maps = self.body(images)
        if [feature.shape[1] for feature in maps] != list(self.channels):
            shapes = [tuple(feature.shape) for feature in maps]
            raise ValueError(
                f"backbone: expected four maps (b, c, h, w) of {list(self.channels)} channels, got {shapes}"
            )
        levels: OrderedDict[str, Tensor] = self.fpn(
            OrderedDict((str(index), feature) for index, feature in enumerate(maps))
        )
        return levels


class FixedRegions(nn.Module):
    """The layers of a detector at a fixed number of regions, for counting: nothing depends on the image.

    Papers count Mask R-CNN so, at 1,000 regions in the box head and 100 in the mask head.

    Args:
        detector: The model whose layers run.
        boxes: Regions in the box head.
        masks: Regions in the mask head.
    """

    def __init__(self, detector: MaskRCNN, boxes: int = 1000, masks: int = 100) -> None:
        super().__init__()
        self.detector, self.boxes, self.masks = detector, boxes, masks

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, box differences and mask logits of regions without content, after one image's pyramid."""
        levels = list(self.detector.backbone(images).values())
        self.detector.rpn.head(levels)
        heads, channels = self.detector.roi_heads, self.detector.config.channels
        regions = levels[0].new_zeros(self.boxes, channels, 7, 7)
        logits, differences = heads.box_predictor(heads.box_head(regions))
        regions = levels[0].new_zeros(self.masks, channels, 14, 14)
        return logits, differences, heads.mask_predictor(heads.mask_head(regions))


def _below(prefix: str, names: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in names.items() if name.startswith(prefix)}


def _channels(body: nn.Module) -> tuple[int, ...]:
    """The channels of a backbone's four maps."""
    info: Any = getattr(body, "feature_info", None)
    named: Any = getattr(body, "channels", None)
    if named is not None:
        channels, strides = tuple(named), getattr(body, "strides", STRIDES[:4])
    elif hasattr(info, "channels"):
        channels, strides = tuple(info.channels()), info.reduction()
    else:
        raise TypeError(
            f"backbone: {type(body).__name__} does not say how many channels its maps have; give it "
            "`channels`, or take vmamba.heads.Features.create(…)"
        )
    if tuple(strides) != STRIDES[:4] or len(channels) != 4:
        raise ValueError(
            f"backbone: expected four maps at strides {STRIDES[:4]}, got {len(channels)} at {tuple(strides)}"
        )
    return channels


def _heads(config: MaskRCNNConfig) -> dict[str, nn.Module]:
    channels, classes = config.channels, config.num_classes
    return {
        "box_head": faster_rcnn.TwoMLPHead(channels * 7 * 7, config.hidden),
        "box_predictor": faster_rcnn.FastRCNNPredictor(config.hidden, classes),
        "mask_head": torchvision_mask_rcnn.MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
        "mask_predictor": torchvision_mask_rcnn.MaskRCNNPredictor(channels, channels, classes),
    }


@torch.no_grad()
def _initialise(fpn: nn.Module, heads: Mapping[str, Any]) -> None:
    """mmdet's initial weights, where torchvision's are others; the background's rows are 0.

    Nothing reads the background's box and mask, so these rows stay 0 in training.
    """
    box_head, box_predictor = heads["box_head"], heads["box_predictor"]
    convs = [module for module in fpn.modules() if isinstance(module, nn.Conv2d)]
    for layer in (*convs, box_head.fc6, box_head.fc7):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    for layer, deviation in ((box_predictor.cls_score, 0.01), (box_predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    masks = heads["mask_predictor"]
    nn.init.zeros_(masks.conv5_mask.bias)
    nn.init.zeros_(masks.mask_fcn_logits.bias)
    nn.init.zeros_(box_predictor.bbox_pred.weight[:4])
    nn.init.zeros_(masks.mask_fcn_logits.weight[:1])


def _check_images(images: Sequence[Tensor]) -> None:
    if not len(images):
        raise ValueError("images: expected at least one")
    for index, image in enumerate(images):
        if image.ndim != 3 or not image.is_floating_point() or 0 in image.shape:
            raise ValueError(
                f"images[{index}]: expected a float tensor (c, h, w) with values in 0 … 1, got {image.dtype} "
                f"of shape {tuple(image.shape)}"
            )


def _check_target(index: int, target: Mapping[str, Tensor], image: Tensor, num_classes: int) -> None:
    where = f"targets[{index}]"
    if missing := [name for name in ("boxes", "labels", "masks") if name not in target]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    boxes, labels, masks = target["boxes"], target["labels"], target["masks"]
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(
            f"{where}['boxes']: expected floats of shape (n, 4), got {boxes.dtype} of shape "
            f"{tuple(boxes.shape)}"
        )
    count, size = len(boxes), tuple(image.shape[-2:])
    if labels.dtype != torch.int64 or tuple(labels.shape) != (count,):
        raise ValueError(
            f"{where}['labels']: expected int64 of shape ({count},), got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if tuple(masks.shape) != (count, *size):
        raise ValueError(
            f"{where}['masks']: expected the image's size, {(count, *size)}, got {tuple(masks.shape)}"
        )
    bad = (~(boxes[:, 2:] > boxes[:, :2]).all(dim=1) | ~boxes.isfinite().all(dim=1)).nonzero()[:, 0]
    if len(bad):
        box = boxes[bad[0]].tolist()
        raise ValueError(
            f"{where}['boxes'][{int(bad[0])}]: expected finite x1 < x2 and y1 < y2, got {box}; leave such "
            "objects out"
        )
    bad = ((labels < 1) | (labels >= num_classes)).nonzero()[:, 0]
    if len(bad):
        raise ValueError(
            f"{where}['labels'][{int(bad[0])}]: expected 1 to {num_classes - 1} (0 is the background), got "
            f"{int(labels[bad[0]])}"
        )
