"""What timm asks of a backbone beyond its forward, for one whose `stages` follow each other.

b batch, h height, w width, c channels.
"""

from typing import TYPE_CHECKING, Any

import torch
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn


class Staged(nn.Module):
    """A backbone of `embed`, `stages`, `norm` and `head`; a subclass adds what it computes.

    Attributes:
        stages: One after another; the result of each is a feature map after `as_map`.
        norm: Of the last result, before `head`.
        head: With `reset(num_classes, pool_type)` and an `fc`.
        feature_info: A line for each stage.
    """

    if TYPE_CHECKING:  # TorchScript would read the annotations
        stages: nn.Sequential
        norm: nn.Module
        head: Any
        feature_info: list[dict[str, Any]]
        num_features: int

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def embed(self, x: Tensor) -> Tensor:
        """Images (b, in_chans, h, w) → what the first stage takes."""
        raise NotImplementedError

    def as_map(self, x: Tensor) -> Tensor:
        """A stage's result → (b, h', w', c')."""
        return x

    def run_stages(self, x: Tensor) -> Tensor:
        """Through all stages."""
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript prunes this branch, not an `and`)
            if self.grad_checkpointing:
                for stage in self.stages:
                    x = checkpoint(stage, x)
                return x
        return self.stages(x)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the stages' inputs for backward, and recompute each stage there."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier's linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier on, of the same device and type; 0 classes for none."""
        reference = next(self.stages.parameters())
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        self.head.to(device=reference.device, dtype=reference.dtype).train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of the stages, (b, c, h, w) each.

        Args:
            x: (b, in_chans, h, w).
            indices: The last n stages if an int, all if None, else those of these indices.
            norm: Apply the final norm to each map.
            stop_early: Stop after the last stage asked for.
            output_fmt: "NCHW" or "NHWC", of the intermediates.
            intermediates_only: Leave the final features out.

        Returns:
            The maps, or the final features (as `forward_features`) and the maps.

        Raises:
            ValueError: `output_fmt` is unknown.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = self.embed(x)
        for i, stage in enumerate(self.stages):
            if stop_early and i > max_index:
                break
            x = stage(x)
            if i in take_indices:
                fits = norm and x.shape[-1] == self.num_features
                feature = self.as_map(self.norm(x) if fits else x)
                intermediates.append(feature.permute(0, 3, 1, 2) if output_fmt == "NCHW" else feature)
        if intermediates_only:
            return intermediates
        return self.finish(x), intermediates

    def finish(self, x: Tensor) -> Tensor:
        """The last stage's result → what `forward_features` gives."""
        raise NotImplementedError

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for these indices; returns them, resolved."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: max_index + 1]
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
            if hasattr(self.head, "norm"):
                self.head.norm = nn.Identity()
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """The last features, normed."""
        return self.finish(self.run_stages(self.embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features → logits (b, num_classes), or what the classifier takes."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
