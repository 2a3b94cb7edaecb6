"""A plain vision transformer with mmseg's multi-level neck ("MLN"): four maps from maps of one size.

b batch, c channels, h height, w width.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.heads.features import STRIDES
from vmamba.models.factory import create_model

SCALES = (4, 2, 1, 0.5)
"""Side of each map over that of the transformer's, whose patches are 16 pixels wide."""


class MultiLevelViT(nn.Module):
    """A vision transformer of timm's, its maps after each quarter of the blocks resized: a feature pyramid.

    (b, in_chans, h, w) → maps (b, c, h / s, w / s) at s = 4, 8, 16, 32; sides are padded to multiples of 16.

    Args:
        name: Of a model with patches of 16 pixels.
        pretrained: Begin the transformer from timm's pretrained weights.
        args: Arguments of the model, such as `drop_path_rate`.

    Attributes:
        model: The transformer.
        channels: Channels of each map.
        strides: Size of the image over that of each map.
    """

    strides = STRIDES

    def __init__(self, name: str, *, pretrained: bool = False, **args: Any) -> None:
        super().__init__()
        args = {"dynamic_img_size": True, "dynamic_img_pad": True, **args}
        self.model = create_model(name, pretrained=pretrained, **args)
        depth, channels = len(self.model.blocks), self.model.embed_dim
        self.indices = [depth * (i + 1) // len(SCALES) - 1 for i in range(len(SCALES))]
        self.model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        self.channels = (channels,) * len(SCALES)
        self.lateral_convs = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in SCALES)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in SCALES)
        for conv in (*self.lateral_convs, *self.convs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model.forward_intermediates(
            images, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps, strict=True)]
        levels = [
            F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)
            for x, scale in zip(levels, SCALES, strict=True)
        ]
        return [conv(x) for conv, x in zip(self.convs, levels, strict=True)]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the transformer: keep less for backward, and recompute it there."""
        self.model.set_grad_checkpointing(enable)
