"""Feature maps of any timm model, in the form that detectors and segmenters take.

b batch, c channels, h height, w width.
"""

import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vmamba.errors import CheckpointError, ModelError
from vmamba.models import VMamba
from vmamba.models.checkpoints import Checkpoint, Weights, open_checkpoint
from vmamba.models.factory import create_model, create_on_meta, output_on_meta
from vmamba.models.official import authors_names, convert_names
from vmamba.models.weights import LoadReport, load_weights

STRIDES = (4, 8, 16, 32)
"""Size of the image over that of each map."""

_ANY_SIZE: dict[str, Any] = {
    "strict_img_size": False,
    "always_partition": True,  # Swin shifts its windows in every stage, however small, as in mmdet and mmseg
}
"""Arguments with which timm's models that are made for one image size take others."""

_TRIAL_SIZE = (203, 165)  # no side divides by 4, and all maps differ in size


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (b, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Features(nn.Module):
    """A timm model as a backbone: (b, in_chans, h, w) → maps (b, c, ⌈h/s⌉, ⌈w/s⌉) at s = 4, 8, 16, 32.

    Some models, such as ConvNeXt, round sizes down instead.

    Args:
        model: Of timm's registry; it loses its classifier and last norm. `Features.create` makes it by name.
        norm: Give each map a LayerNorm over its channels, `outnorm0` to `outnorm3`, as VMamba's authors do.

    Attributes:
        model: The model.
        channels: Channels of each map.
        strides: Size of the image over that of each map.
        pretrained_cfg: The model's configuration (mean, std, …), with names of modules as they are here.

    Raises:
        ModelError: The model has no maps at these strides.
    """

    def __init__(self, model: Any, *, norm: bool = True) -> None:
        super().__init__()
        self.indices = _indices(model)
        levels = [model.feature_info[index] for index in self.indices]
        self.channels = tuple(int(level["num_chs"]) for level in levels)
        self.strides = tuple(int(level["reduction"]) for level in levels)
        model.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        patches: Any = getattr(model, "patch_embed", None)
        if getattr(patches, "dynamic_img_pad", None) is False:
            patches.dynamic_img_pad = True  # pad sizes that are no multiple of the patch
        self.model = model
        like = next(model.parameters())
        for i, channels in enumerate(self.channels):
            layer = ChannelNorm(channels, device=like.device, dtype=like.dtype) if norm else nn.Identity()
            self.add_module(f"outnorm{i}", layer)
        cfg = dict(getattr(model, "pretrained_cfg", None) or {})
        if first := cfg.get("first_conv"):
            cfg["first_conv"] = [f"model.{name}" for name in ([first] if isinstance(first, str) else first)]
        self.pretrained_cfg = cfg

    @classmethod
    def create(
        cls,
        name: str,
        *,
        checkpoint: str | PathLike[str] | Mapping[str, Any] | Checkpoint | None = None,
        weights: Weights = "auto",
        pretrained: bool = False,
        norm: bool = True,
        **args: Any,
    ) -> "Features":
        """The features of a model of timm's registry, of images of any size.

        Args:
            name: As in `timm.create_model`.
            checkpoint: Weights to begin from, see `load`.
            weights: Which of the checkpoint's weights: "raw", as trained, "ema", their average, or "auto".
            pretrained: Begin from timm's pretrained weights, or the authors' for VMamba.
            norm: As above.
            args: Arguments of the model, such as `drop_path_rate` or `in_chans`.

        Raises:
            ModelError: There is no such model or argument, or it has no maps at the strides 4 to 32 for
                images of any size.
            CheckpointError: The weights cannot be read, or do not fit; all that is missing or differs is
                listed.
        """
        if checkpoint is not None and pretrained:
            raise ModelError("checkpoint, pretrained: expected one of them, got both")
        takes = inspect.signature(type(create_on_meta(name, **args)).__init__).parameters
        args = {**{key: value for key, value in _ANY_SIZE.items() if key in takes}, **args}
        _check_maps(name, create_on_meta(name, **args, num_classes=0), args.get("in_chans"))
        if not pretrained:  # with another classifier than its weights' timm would hide missing weights
            args["num_classes"] = 0
        features = cls(create_model(name, pretrained=pretrained, **args), norm=norm)
        if checkpoint is not None:
            features.load(checkpoint, weights=weights)
        return features

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.model.forward_intermediates(
            images, indices=self.indices, output_fmt="NCHW", intermediates_only=True
        )
        return [getattr(self, f"outnorm{i}")(level) for i, level in enumerate(maps)]

    def load(
        self,
        checkpoint: str | PathLike[str] | Mapping[str, Any] | Checkpoint,
        *,
        weights: Weights = "auto",
        in_chans: Literal["convert", "refuse"] = "refuse",
    ) -> LoadReport:
        """Load the backbone of a classifier, detector or segmenter; its heads are left out.

        A classifier has no norms of the maps: those here then keep their values.

        Args:
            checkpoint: As `vmamba.load_weights` takes it: of a run, of timm or of the VMamba authors.
            weights: "raw", "ema" or "auto".
            in_chans: "convert" adapts the first convolution to another number of image channels.

        Raises:
            CheckpointError: It cannot be read, or weights of the model are missing in it or differ in shape;
                all are listed, and nothing was loaded.
        """
        file = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        names = file.state_dict(weights)
        norms = [name for name in self.state_dict() if name.startswith("outnorm")]
        missing = [norm for norm in norms if not any(name.endswith(norm) for name in names)]
        if missing and len(missing) < len(norms):
            raise CheckpointError(f"{file.path}: has norms for some maps only, missing: {', '.join(missing)}")
        return load_weights(self, file, classifier="drop", in_chans=in_chans, weights=weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As of the model: keep less for backward, and recompute it there."""
        self.model.set_grad_checkpointing(enable)

    def convert_names(self, weights: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
        """Weights under the model's names, the authors' or ours → under those here, for `load_weights`.

        Args:
            weights: A backbone's.
            shapes: Of this module's weights.
        """
        inside = {
            name.removeprefix("model."): shape for name, shape in shapes.items() if name.startswith("model.")
        }
        bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
        return {
            f"model.{name}" if name in inside else name: weight
            for name, weight in convert_names(bare, inside).items()
        }


def backbone_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a `Features` under the names of mmdet's and mmseg's backbones, without "backbone.".

    Those of a VMamba get its authors' names and shapes, others keep timm's.
    """
    bare = {name.removeprefix("model."): weight for name, weight in state_dict.items()}
    return authors_names(bare)


def _indices(model: Any) -> list[int]:
    """Which of a model's feature maps to take: the last one at each stride."""
    kind = type(model).__name__
    if not hasattr(model, "forward_intermediates"):
        raise ModelError(f"{kind}: this version of timm gives no feature maps of it (forward_intermediates)")
    last = {level["reduction"]: index for index, level in enumerate(model.feature_info)}
    if missing := [stride for stride in STRIDES if stride not in last]:
        stem = "; create it with stem_stride=4" if isinstance(model, VMamba) and 2 in last else ""
        raise ModelError(
            f"{kind}: expected feature maps at the strides {STRIDES}, it has none at {missing} but at "
            f"{sorted(last)}{stem}"
        )
    return [last[stride] for stride in STRIDES]


def _check_maps(name: str, model: nn.Module, in_chans: int | None) -> None:
    """Try a model on the meta device with an image of another size than it may be made for."""
    height, width = _TRIAL_SIZE
    features = Features(model, norm=False).eval()
    images = torch.empty(
        1, in_chans or features.pretrained_cfg.get("input_size", (3,))[0], height, width, device="meta"
    )
    refusal = f"{name}: does not work with images of any size, such as {height}×{width}"
    maps = output_on_meta(features, images, refusal)
    if maps is None:
        return
    for level, channels, stride in zip(maps, features.channels, features.strides, strict=True):
        wrong = level.ndim != 4 or level.shape[1] != channels
        if wrong or any(
            not size // stride <= side <= -(-size // stride)
            for side, size in zip(level.shape[2:], _TRIAL_SIZE, strict=True)
        ):
            raise ModelError(
                f"{name}: expected a map (b, {channels}, h, w) at stride {stride}, got {tuple(level.shape)} "
                f"for {height}×{width}"
            )
