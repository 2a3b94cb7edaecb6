"""Effective receptive field (Figure 10): how strongly each pixel moves the centre of the last feature map."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vmamba.errors import UserError
from vmamba.files import save_figure
from vmamba.nn.modes import evaluating

SHARES = (0.2, 0.3, 0.5, 0.99)
"""The shares of the contribution for which the paper on RepLKNet compares areas."""


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
    maps = [each for image in images if not (each := contribution(model, image)).isnan().any()]
    if not maps:
        raise ReceptiveFieldError("no image gave a map without NaN; give at least one, and check the weights")
    return torch.stack(maps).mean(0)


def contribution(model: nn.Module, image: Tensor, at: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """How strongly each pixel of one image moves the last feature map at one position.

    Args:
        model: As `receptive_field`.
        image: Normalised, (channels, height, width).
        at: (x, y) of the position over width and height, each in [0, 1).

    Returns:
        (height, width), float32, on the CPU; it may have NaN.

    Raises:
        ReceptiveFieldError: The position lies outside of the image.
    """
    x, y = at
    if not (0 <= x < 1 and 0 <= y < 1):
        raise ReceptiveFieldError(f"at: expected x and y in [0, 1), got {at}")
    like = next(model.parameters())
    with evaluating(model):
        pixels = image.to(like.device, like.dtype)[None].requires_grad_()
        feature = model.forward_intermediates(pixels, indices=1, intermediates_only=True)[-1]  # type: ignore[operator]
        height, width = feature.shape[-2:]
        position = feature.relu()[..., int(y * height), int(x * width)].sum()
        (gradient,) = torch.autograd.grad(position, pixels)
    return gradient[0].relu().sum(0).float().cpu()


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
    rows, columns = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    ring = torch.maximum(rows[:, None], columns).flatten()  # half the side of the least square with a pixel
    from_ring_on = ring.bincount(field.flatten().double()).flip(0).cumsum(0).flip(0)
    outside = torch.cat([from_ring_on[1:], torch.zeros(1)])  # exactly 0 where nothing is left
    half = int((outside <= (1 - share) * from_ring_on[0]).int().argmax())
    return int((ring <= half).sum()) / field.numel()


def draw(fields: Mapping[str, Tensor], path: str | Path, columns: int | None = None) -> None:
    """Write maps as a PNG, each shown as (map / max)^0.2, with the areas that hold `SHARES` below it.

    Args:
        fields: Titles and maps, (height, width), row by row.
        path: Of the picture.
        columns: Maps in a row; None for one row of all.
    """
    from matplotlib.figure import Figure

    columns = columns or len(fields)
    rows = -(-len(fields) // columns)
    figure = Figure(figsize=(3.1 * columns + 1, 3.6 * rows), layout="constrained")
    for axes, (title, field) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, fields.items(), strict=True
    ):
        height, width = field.shape
        shares = (field / field.max().clamp_min(1e-30)) ** 0.2
        picture = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1, extent=(0, width, height, 0))
        axes.set_title(title, fontsize=12)
        axes.set_xticks([0, width])
        axes.set_yticks([0, height])
        areas = [f"{share:.0%}: {high_contribution_ratio(field, share):.1%}" for share in SHARES]
        axes.set_xlabel(f"{'   '.join(areas[:2])}\n{'   '.join(areas[2:])}", fontsize=10)
    figure.axes[0].set_ylabel("pixels")
    bar = figure.colorbar(picture, ax=figure.axes, shrink=0.8, aspect=30)
    bar.set_label("(contribution / largest)$^{0.2}$")
    note = "below each map: area of the smallest" + ("\n" if columns == 1 else " ")
    figure.supxlabel(f"{note}centred square with that share", fontsize=10)
    save_figure(figure, path, dpi=120)
