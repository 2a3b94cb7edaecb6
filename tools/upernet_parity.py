"""Comparing our UPerNet with what mmseg's computed, on files laid out like tests/data/upernet_micro.safetensors.

Sizes and numbers of classes are read from the weights.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vmamba.heads.upernet import FCNHead, UPerHead, UPerNet
from vmamba.models.weights import load_weights

TOLERANCES = {"logits": 1e-5, "aux_logits": 1e-5, "loss": 1e-6, "aux_loss": 1e-6}
"""The largest absolute difference of each number that `compare_upernet` gives."""

_POOL_SCALES = (1, 2, 3, 6)


class GivenMaps(nn.Module):
    """A backbone that gives the file's maps, whatever the image."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps


def build(tensors: Mapping[str, Tensor]) -> UPerNet:
    """The heads of the file's sizes with its weights, in evaluation mode, on its maps."""
    weights = {
        name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")
    }
    maps = [tensors[f"feature.{i}"] for i in range(sum(name.startswith("feature.") for name in tensors))]
    classes, channels = weights["decode_head.conv_seg.weight"].shape[:2]
    aux_classes, aux_channels = weights["auxiliary_head.conv_seg.weight"].shape[:2]
    pools = {name.split(".")[2] for name in weights if name.startswith("decode_head.psp_modules.")}
    model = UPerNet(
        GivenMaps(maps),
        UPerHead([m.shape[1] for m in maps], classes, channels, pool_scales=_POOL_SCALES[: len(pools)]),
        FCNHead(weights["auxiliary_head.convs.0.conv.weight"].shape[1], aux_classes, aux_channels),
    )
    load_weights(model, weights)
    return model.eval()


def compare_upernet(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest absolute differences from logits and losses in a file, by their names there.

    Args:
        tensors: The file's.
    """
    model = build(tensors)
    labels = tensors["label"].flatten(0, -3)  # (b, 1, h, w) → (b, h, w)
    images = tensors["feature.0"].new_zeros(len(labels), 3, *labels.shape[1:])
    with torch.no_grad():
        maps = model.backbone(images)
        losses = model(images, labels)
        results = {
            "logits": model.decode_head(maps),
            "aux_logits": model.auxiliary_head(maps[-2]),
            "loss": losses["decode.loss_ce"],
            "aux_loss": losses["aux.loss_ce"],
        }
    return {name: (value - tensors[name]).abs().max().item() for name, value in results.items()}
