"""Effective receptive field (Figure 10): how strongly each pixel moves the centre of the last feature map."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.nn.modes import evaluating


class ReceptiveFieldError(UserError, ValueError):
    """No image gave a finite map."""


def receptive_field(model: nn.Module, images: Iterable[Tensor]) -> Tensor:
    """Mean contribution of each pixel, as the authors draw it.

    For each image: the last feature map before the final norm, through ReLU, at its centre, summed over
    channels; its gradient with respect to the image, through ReLU, summed over channels. Maps with NaN are
    left out.

    Args:
        model: Any timm model with `forward_intermediates`; it runs in evaluation mode.
        images: Normalised images, (channels, height, width) each, all of one size.

    Returns:
        (height, width), float32, on the CPU.

    Raises:
        ReceptiveFieldError: There is no image, or none gave a map without NaN.
    """
    device = next(model.parameters()).device
    maps = []
    with evaluating(model):
        for image in images:
            pixels = image.to(device)[None].requires_grad_()
            feature = model.forward_intermediates(pixels, indices=1, intermediates_only=True)[-1]  # type: ignore[operator]
            centre = feature.relu()[..., feature.shape[-2] // 2, feature.shape[-1] // 2].sum()
            (gradient,) = torch.autograd.grad(centre, pixels)
            contribution = gradient[0].relu().sum(0)
            if not contribution.isnan().any():
                maps.append(contribution.float().cpu())
    if not maps:
        raise ReceptiveFieldError("no image gave a map without NaN; give at least one, and check the weights")
    return torch.stack(maps).mean(0)


def high_contribution_ratio(field: Tensor, share: float) -> float:
    """Area of the smallest centred square that holds a share of the contribution, over the whole area.

    Args:
        field: (height, width), not negative.
        share: In (0, 1].

    Raises:
        ValueError: `share` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected more than 0 and at most 1, got {share}")
    height, width = field.shape
    total = field.sum()
    for half in range(max(height, width)):
        top, left = max(0, height // 2 - half), max(0, width // 2 - half)
        square = field[top : height // 2 + half + 1, left : width // 2 + half + 1]
        if square.sum() >= share * total:
            return square.numel() / field.numel()
    return 1.0


def draw(fields: dict[str, Tensor], path: str | Path) -> None:
    """Write maps side by side as a PNG, each shown as (map / max)^0.2.

    Args:
        fields: Titles and maps, (height, width).
        path: Of the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(fields), 3.9), layout="constrained")
    for axes, (title, field) in zip(
        figure.subplots(1, len(fields), squeeze=False)[0], fields.items(), strict=True
    ):
        shares = (field / field.max().clamp_min(1e-30)) ** 0.2
        shown = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(shown, ax=figure.axes, label="(contribution / largest)^0.2", shrink=0.8)
    figure.savefig(path, dpi=120)
