"""Compare models and heads with the numbers that their authors' code, or mmdet's and mmseg's, computed.

    python tools/parity.py [--device cuda] FILE…

A file holds weights (`param.*`, under the other code's names), inputs, and what was computed from them:
`tests/data/README.md` lists its keys. Sizes and classes are read from the weights. Printed is the largest
difference of each quantity; the exit status is 1 where one is beyond its tolerance.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

import vmamba
from vmamba.heads import mask_rcnn
from vmamba.heads.masks import mask_targets, paste_masks
from vmamba.heads.names import from_mmdet
from vmamba.heads.upernet import FCNHead, UPerHead, UPerNet

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """The largest difference of one quantity, and how large it may be."""

    quantity: str
    value: float
    tolerance: float

    @property
    def within(self) -> bool:
        return self.value <= self.tolerance  # never for NaN

    def __str__(self) -> str:
        verdict = "ok" if self.within else "BEYOND"
        return f"  {self.quantity:<32} {self.value:10.3g}   (at most {self.tolerance:g})   {verdict}"


@dataclass(frozen=True)
class ParityFile:
    """The content of a file; `used` gathers the keys that a check read."""

    tensors: Tensors
    metadata: Mapping[str, str]
    used: set[str]

    def __getitem__(self, key: str) -> Tensor:
        self.used.add(key)
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys begin so, without that beginning."""
        return {key.removeprefix(prefix): self[key] for key in self.tensors if key.startswith(prefix)}

    def size(self, name: str) -> tuple[int, int] | None:
        """A (height, width) of the metadata."""
        if name not in self.metadata:
            return None
        height, width = map(int, self.metadata[name].split(","))
        return height, width


def absolute(actual: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite for another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    return (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return absolute(actual, expected) / expected.abs().max().item()


# --- VMamba ---------------------------------------------------------------------------------------------


def vmamba_settings(weights: Tensors) -> dict[str, Any]:
    """The arguments of `vmamba.VMamba` for weights under the authors' names."""
    blocks: dict[int, set[str]] = {}
    for name in weights:
        if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    dims = [len(weights[f"layers.{i}.blocks.0.norm.weight"]) for i in sorted(blocks)]
    first = {name.removeprefix("layers.0.blocks.0."): w for name, w in weights.items()}
    inner, conv, fc1 = len(first["op.Ds"]) // 4, first.get("op.conv2d.weight"), first.get("mlp.fc1.weight")
    return {
        "num_classes": len(weights["classifier.head.weight"]),
        "in_chans": weights["patch_embed.0.weight"].shape[1],
        "depths": tuple(len(blocks[i]) for i in sorted(blocks)),
        "dims": tuple(dims),
        "d_state": first["op.A_logs"].shape[1],
        "dt_rank": None if _default_rank(weights, dims) else first["op.dt_projs_weight"].shape[2],
        "ssm_ratio": inner / dims[0],
        "ssm_conv": 0 if conv is None else conv.shape[-1],
        "ssm_conv_bias": "op.conv2d.bias" in first,
        "gate": len(first["op.in_proj.weight"]) == 2 * inner,
        "mlp_ratio": 0.0 if fc1 is None else len(fc1) / dims[0],
        "stem": "conv" if "patch_embed.7.weight" in weights else "patch",
        "downsample": "merge" if "layers.0.downsample.reduction.weight" in weights else "conv",
    }


def _default_rank(weights: Tensors, dims: list[int]) -> bool:
    """Whether delta has the rank ⌈c / 16⌉ in every stage."""
    ranks = [weights[f"layers.{i}.blocks.0.op.dt_projs_weight"].shape[2] for i in range(len(dims))]
    return ranks == [-(-width // 16) for width in dims]


def check_vmamba(file: ParityFile) -> Iterator[Difference]:
    """Stages and logits within 1e-5 of the largest value, gradients within 1e-4."""
    weights = file.below("param.")
    settings = vmamba_settings(weights)
    device = file["input"].device
    model = vmamba.load_official(vmamba.VMamba(**settings), weights).to(device)
    stages = model.forward_intermediates(file["input"], intermediates_only=True)
    for i, stage in enumerate(stages):
        yield Difference(f"stage.{i}", relative(stage, file[f"stage.{i}"]), 1e-5)
    logits = model(file["input"])
    yield Difference("logits", relative(logits, file["logits"]), 1e-5)
    if theirs := file.below("grad."):
        logits.square().sum().backward()
        # A model that holds the gradients as its weights: loading turns their names and shapes into ours.
        gradients = vmamba.load_official(vmamba.VMamba(**settings), theirs).to(device)
        expected = dict(gradients.named_parameters())
        worst = {name: relative(p.grad, expected[name]) for name, p in model.named_parameters()}
        name = max(worst, key=lambda name: (worst[name] != worst[name], worst[name]))
        yield Difference("gradients", worst[name], 1e-4)


# --- Mask R-CNN -----------------------------------------------------------------------------------------


class GivenMaps(nn.Module):
    """A backbone that returns the same maps for any image."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps
        self.channels = tuple(each.shape[1] for each in maps)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


def nearest(actual: Tensor, expected: Tensor) -> tuple[Tensor, float]:
    """For each expected row the nearest actual one, and the largest distance in either direction.

    The distance is infinite where the numbers of rows differ or two rows have the same nearest one.
    """
    if len(actual) != len(expected) or not len(actual):
        return torch.arange(len(expected)), 0.0 if len(actual) == len(expected) else float("inf")
    distances = (expected[:, None].double() - actual[None].double()).abs().amax(dim=2)
    values, indices = distances.min(dim=1)
    unique = len(indices.unique()) == len(indices)
    return indices, values.max().item() if unique else float("inf")


def check_mask_rcnn(file: ParityFile) -> Iterator[Difference]:
    """The pyramid within 1e-5, boxes within 1e-3 pixels, scores within 1e-6, masks identical.

    Each step begins with what the file has of the step before, so that rounding does not add up.
    """
    weights = from_mmdet(file.below("param."))
    maps = [file[f"feature.{i}"] for i in range(4)]
    detector = mask_rcnn(
        GivenMaps(maps),
        num_classes=len(weights["roi_heads.box_predictor.cls_score.weight"]),
        channels=len(weights["rpn.head.conv.0.0.weight"]),
        hidden=len(weights["roi_heads.box_head.fc6.weight"]),
        # No file says how many it allows: as many as it has.
        proposals=len(file["proposals"]),
        detections=len(file["boxes"]),
    ).eval()
    vmamba.load_weights(detector, file.below("param."))
    with torch.inference_mode():
        padded = file.size("padded") or tuple(4 * side for side in maps[0].shape[-2:])
        levels = detector.backbone(torch.zeros(1, 3, *padded))
        for i, level in enumerate(levels.values()):
            yield Difference(f"fpn.{i}", absolute(level, file[f"fpn.{i}"]), 1e-5)
        levels = {name: file[f"fpn.{i}"] for i, name in enumerate(levels)}
        yield from _regions(file, detector, levels, padded)
        if "train.rois" in file:
            yield _mask_targets(file)


def _regions(
    file: ParityFile, detector: Any, levels: Mapping[str, Tensor], padded: tuple[int, int]
) -> Iterator[Difference]:
    """From the pyramid to the proposals, and from these to the detections in the original image."""
    # Without metadata: proposals are clipped to the image, and of many some end at its border.
    size = file.size("image") or tuple(file["proposals"][:, 2:].amax(dim=0).round().int().flip(0).tolist())
    height, width = file["mask_shape"][1:].tolist()
    images = ImageList(torch.zeros(1, 3, *padded), [size])
    anchors = detector.rpn.anchor_generator(images, list(levels.values()))[0]
    expected = torch.cat([file[f"anchors.{i}"] for i in range(len(levels))])
    yield Difference("anchors", absolute(anchors, expected), 1e-3)
    proposals, scores = _proposals(detector.rpn, images, levels)
    order, distance = nearest(proposals, file["proposals"])
    yield Difference("proposals", distance, 1e-3)
    if not distance < float("inf"):  # what follows begins with the file's
        return
    yield Difference("proposal_scores", absolute(scores[order], file["proposal_scores"]), 1e-6)
    detections, _ = detector.roi_heads(levels, [file["proposals"]], [size])
    (result,) = detector.transform.postprocess(detections, [size], [(height, width)])
    # The label as a fifth coordinate: another label is a distance of at least 1.
    ours = torch.cat([result["boxes"], result["labels"][:, None] - 1], dim=1)
    order, distance = nearest(ours, torch.cat([file["boxes"], file["labels"][:, None]], dim=1))
    yield Difference("boxes and labels", distance, 1e-3)
    if not distance < float("inf"):
        return
    yield Difference("scores", absolute(result["scores"][order], file["scores"]), 1e-6)
    bits = file["masks"][..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1
    masks = bits.flatten(start_dim=2)[..., :width]
    ours = paste_masks(result["masks"], result["boxes"], (height, width))
    wrong = (ours[order, 0] >= 0.5) != masks.bool()
    yield Difference("masks: wrong pixels", wrong.sum().item(), 0)


def _proposals(network: Any, images: ImageList, levels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The boxes of a proposal network for one image, and their scores, which its call does not return."""
    recorded = []
    select = network.filter_proposals

    def recording(*arguments: Any) -> Any:
        recorded.append(select(*arguments))
        return recorded[-1]

    network.filter_proposals = recording
    network(images, levels)
    del network.filter_proposals
    (((boxes,), (scores,)),) = recorded
    return boxes, scores


def _mask_targets(file: ParityFile) -> Difference:
    expected = file["train.mask_targets"]
    masks, boxes = file["train.gt_masks"], file["train.rois"]
    actual = mask_targets(masks, boxes, file["train.matched"], expected.shape[-1])
    file["train.gt_boxes"]  # the boxes around the masks, which mask targets do not depend on
    return Difference("mask targets: wrong cells", (actual != expected).sum().item(), 0)


# --- UPerNet ---------------------------------------------------------------------------------------------


def check_upernet(file: ParityFile) -> Iterator[Difference]:
    """Logits within 1e-5, losses within 1e-6."""
    weights = file.below("param.")
    maps = [file[f"feature.{i}"] for i in range(4)]
    labels = file["label"].flatten(0, -3)  # (b, 1, h, w) → (b, h, w)
    pools = {name.split(".")[2] for name in weights if name.startswith("decode_head.psp_modules.")}
    model = UPerNet(
        GivenMaps(maps),
        UPerHead(
            [each.shape[1] for each in maps],
            num_classes=len(weights["decode_head.conv_seg.weight"]),
            channels=weights["decode_head.conv_seg.weight"].shape[1],
            pool_scales=(1, 2, 3, 6)[: len(pools)],
        ),
        FCNHead(
            maps[2].shape[1],
            num_classes=len(weights["auxiliary_head.conv_seg.weight"]),
            channels=weights["auxiliary_head.conv_seg.weight"].shape[1],
        ),
    ).eval()
    vmamba.load_weights(model, weights)
    with torch.inference_mode():
        yield Difference("logits", absolute(model.decode_head(maps), file["logits"]), 1e-5)
        yield Difference("aux_logits", absolute(model.auxiliary_head(maps[2]), file["aux_logits"]), 1e-5)
        losses = model(maps[0].new_zeros(len(labels), 3, *labels.shape[1:]), labels)
    yield Difference("loss", absolute(losses["decode.loss_ce"], file["loss"]), 1e-6)
    yield Difference("aux_loss", absolute(losses["aux.loss_ce"], file["aux_loss"]), 1e-6)


# --- All files ------------------------------------------------------------------------------------------

CHECKS: dict[str, tuple[set[str], Callable[[ParityFile], Iterator[Difference]]]] = {
    "VMamba": ({"input", "stage.0", "logits"}, check_vmamba),
    "Mask R-CNN": ({"feature.0", "fpn.0", "proposals", "boxes", "masks"}, check_mask_rcnn),
    "UPerNet": ({"feature.0", "label", "logits", "aux_logits"}, check_upernet),
}
"""Kinds of files: the keys by which one is recognised, and its check."""


def read(path: Path, device: str = "cpu") -> ParityFile:
    """A file's tensors, on a device, and metadata."""
    with safe_open(path, framework="pt", device=device) as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118  (not a dict)
        return ParityFile(tensors, content.metadata() or {}, set())


def check(path: Path, device: str = "cpu") -> bool:
    """Print the differences of a file; whether all are within their tolerances."""
    try:
        file = read(path, device)
    except (OSError, SafetensorError) as error:
        print(f"{path}: cannot be read ({error})", file=sys.stderr)
        return False
    kinds = [kind for kind, (keys, _) in CHECKS.items() if all(key in file for key in keys)]
    if len(kinds) != 1:
        expected = "; ".join(f"{kind}: {', '.join(sorted(keys))}" for kind, (keys, _) in CHECKS.items())
        print(f"{path}: of no known kind; recognised by their keys are {expected}", file=sys.stderr)
        return False
    print(f"{path} ({kinds[0]})")
    differences = []
    for difference in CHECKS[kinds[0]][1](file):
        print(difference)
        differences.append(difference)
    if unread := sorted(file.tensors.keys() - file.used):
        print(f"  not checked: {', '.join(unread)}")
    return all(difference.within for difference in differences)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu", help="where to compute; for files of VMamba alone")
    options = parser.parse_args(arguments)
    verdicts = [check(path, options.device) for path in options.files]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
