"""Backbones of the paper's tables that timm does not have, by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from vmamba.heads.features import Features
from vmamba.heads.peers.multi_level import MultiLevelViT
from vmamba.heads.peers.vit_adapter import ViTAdapter

PEERS: dict[str, Callable[..., nn.Module]] = {
    "deit_small_mln": partial(MultiLevelViT, "deit_small_patch16_224"),
    "deit_base_mln": partial(MultiLevelViT, "deit_base_patch16_224"),
    "vit_adapter_small": partial(ViTAdapter, "deit_small_patch16_224"),
}
"""Names, each with what makes the backbone."""

__all__ = ["PEERS", "MultiLevelViT", "ViTAdapter", "create_backbone"]


def create_backbone(name: str, **args: Any) -> nn.Module:
    """A backbone for dense tasks: one of `PEERS`, or the `Features` of a model of timm's, ours among them.

    Args:
        name: Of the backbone.
        args: As `Features.create` takes them, or the peer.

    Raises:
        ModelError: There is no such model or argument, or it has no maps at the strides 4 to 32.
        CheckpointError: The weights cannot be read, or do not fit.
    """
    return PEERS[name](**args) if name in PEERS else Features.create(name, **args)
