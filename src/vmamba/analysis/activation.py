"""Activation maps (Figures 4–7): a scan seen as attention, from every position to every one before it.

Along a route, with Q = C, K = B and V = δx (equation 19), position i takes from position j ≤ i, in channel d,

    Σ_n C[i,n] B[j,n] exp(A[d,n] (S[i,d] − S[j,d])) δ[j,d] x[j,d],    S the running sum of δ.

A map is a part of this, averaged over channels: `CB` is Q Kᵀ alone, `ww` the decay alone, `CwBw` both.

H height, W width, L = H·W positions, D channels, K routes, N state size, R rank of delta.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vmamba.errors import UserError
from vmamba.models import VMamba
from vmamba.nn import SS2D, CascadeSS2D
from vmamba.ops import ROUTES
from vmamba.ops.routes import scan_order

KINDS = ("CB", "CwBw", "ww")
_VALUES_AT_ONCE = 2**23


class ActivationError(UserError, ValueError):
    """The maps that were asked for do not exist."""


@dataclass(frozen=True)
class ActivationMaps:
    """The maps of one SS2D on one image.

    Attributes:
        maps: (K, L, L), float32; row i of a route is what its i-th position takes from each, 0 above the
            diagonal.
        orders: (K, L), the flat image positions (h·W + w) as each route visits them.
        routes: The name of each route.
        size: (H, W).
    """

    maps: Tensor
    orders: Tensor
    routes: tuple[str, ...]
    size: tuple[int, int]

    def merged(self, *, scale_each: bool = False) -> Tensor:
        """The sum over routes, or the mean of the scaled maps, (L, L), rows and columns in image order."""
        total = torch.zeros_like(self.maps[0])
        for route, order in zip(self.maps, self.orders, strict=True):
            total[order[:, None], order] += scaled(route) / len(self.maps) if scale_each else route
        return total

    def diagonal(self) -> Tensor:
        """What each position keeps of itself, over all routes, (H, W): the heat map of Figure 5 (c)."""
        return self.merged().diagonal().view(self.size)

    def from_query(self, query: tuple[float, float]) -> Tensor:
        """What one position takes from each, a heat map for each route, (K, H, W).

        Args:
            query: (x, y) of the position over width and height, each in [0, 1).

        Raises:
            ActivationError: It lies outside of the image.
        """
        x, y = query
        if not (0 <= x < 1 and 0 <= y < 1):
            raise ActivationError(f"query: expected x and y in [0, 1), got {query}")
        height, width = self.size
        position = int(y * height) * width + int(x * width)
        found = torch.zeros_like(self.maps[:, 0])
        for heat, route, order in zip(found, self.maps, self.orders, strict=True):
            heat[order] = route[order == position][0]
        return found.view(-1, height, width)


def scaled(values: Tensor) -> Tensor:
    """Shifted and scaled to [0, 1]; all zero if the values are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def activation_maps(
    model: nn.Module,
    image: Tensor,
    *,
    stage: int = 2,
    block: int = 1,
    kind: str = "CwBw",
    with_delta: bool = False,
) -> ActivationMaps:
    """The activation maps of one block on one image; by default of the block that the paper shows.

    Takes L²·D·N exponentials a route: seconds for VMamba-T at 512², where L is 1,024.

    Args:
        model: A `VMamba`; it is put to eval mode for the time of the call.
        image: Normed, (in_chans, height, width); the paper's is 512².
        stage: Index of the stage.
        block: Index of the block in its stage.
        kind: "CB", "CwBw" or "ww".
        with_delta: Multiply each column by its δ.

    Raises:
        ActivationError: The model has no such block, its scan is the cascade, `kind` is unknown, or the
            image has not three dimensions.
    """
    if kind not in KINDS:
        raise ActivationError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if image.ndim != 3:
        raise ActivationError(f"image: expected (channels, height, width), got shape {tuple(image.shape)}")
    layer = _layer(model, stage, block)
    size, delta, B, C = _operands(model, image, layer)
    orders = scan_order(layer.routes, *size, delta.device)
    A, dt_bias, dt_weight = layer.A().float(), layer.dt_bias.float(), layer.dt_weight.float()
    maps = [
        _map(
            F.softplus(delta[:, k][order] @ dt_weight[k].T + dt_bias[k]),
            A[k], B[:, k][order], C[:, k][order], kind, with_delta,
        )
        for k, order in enumerate(orders)
    ]  # fmt: skip
    routes = tuple(ROUTES[code] for code in layer.routes)
    return ActivationMaps(torch.stack(maps).cpu(), orders.cpu(), routes, size)


def _layer(model: nn.Module, stage: int, block: int) -> SS2D:
    if not isinstance(model, VMamba):
        raise ActivationError(f"model: expected a VMamba, got {type(model).__name__}")
    depths = [len(s.blocks) for s in model.stages]  # type: ignore[arg-type]
    if not (0 <= stage < len(depths) and 0 <= block < depths[stage]):
        raise ActivationError(
            f"stage, block: there is no stages[{stage}].blocks[{block}]; the stages have {depths} blocks"
        )
    layer = cast(SS2D, model.get_submodule(f"stages.{stage}.blocks.{block}.op"))
    if isinstance(layer, CascadeSS2D):
        raise ActivationError("the cascade scans line by line; it has no map over the whole image")
    return layer


def _operands(model: nn.Module, image: Tensor, layer: SS2D) -> tuple[tuple[int, int], Tensor, Tensor, Tensor]:
    """(H, W), and what the layer's scan takes: delta (L, K, R), B and C (L, K, N), float32."""
    taken: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    training = model.training
    reference = next(model.parameters())
    try:
        with torch.no_grad():
            model.eval()(image[None].to(reference.device, reference.dtype))
            x, *others, _ = layer.project(taken[0])
    finally:
        hook.remove()
        model.train(training)
    delta, B, C = (t[0].flatten(0, 1).float() for t in others)
    return (x.shape[1], x.shape[2]), delta, B, C


@torch.no_grad()
def _map(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, kind: str, with_delta: bool) -> Tensor:
    """One route's map, (L, L), from delta (L, D), A (D, N), B and C (L, N), all in the route's order."""
    if kind == "CB":
        product = C @ B.T
        return (product * delta.mean(1) if with_delta else product).tril()
    length, channels = delta.shape
    total = delta.new_zeros(length, length)
    time = delta.cumsum(0, dtype=torch.float64)
    step = max(1, _VALUES_AT_ONCE // (length * channels))
    for start in range(0, length, step):
        rows, columns = slice(start, start + step), slice(0, start + step)
        # Counted from the first row, so that float32 is precise wherever the decay is not 0.
        since = (time[columns] - time[start]).float()
        span = (since[rows, None] - since).clamp_min_(0)  # (rows, columns, D)
        for n in range(A.shape[1]):
            decay = torch.exp(span * A[:, n])
            mean = (decay * delta[columns]).mean(-1) if with_delta else decay.mean(-1)
            total[rows, columns] += mean if kind == "ww" else mean * C[rows, n, None] * B[columns, n]
    return total.tril()


def draw(found: ActivationMaps, image: Tensor, query: tuple[float, float], path: str | Path) -> None:
    """Write maps as a PNG: what a query patch takes from the image, and under it the whole maps.

    Each picture is scaled for itself; what a route has not reached is blank.

    Args:
        found: From `activation_maps`.
        image: To show, (C, height, width), in [0, 1].
        query: (x, y) of the patch, each in [0, 1).
        path: Of the picture.

    Raises:
        ActivationError: The query lies outside of the image.
    """
    from matplotlib.figure import Figure

    length, columns = found.maps.shape[1], len(found.routes) + 2
    unreached = torch.full((length, length), torch.nan).triu(1)  # is left blank
    reached = replace(found, maps=found.maps + unreached)
    figure = Figure(figsize=(2.4 * columns, 5.4), layout="constrained")
    (shown, *upper), (kept, *lower) = figure.subplots(2, columns)
    channels, *pixels = image.shape
    shown.imshow(image.permute(1, 2, 0).numpy() if channels == 3 else image[0].numpy(), cmap="gray")
    shown.plot(query[0] * pixels[1], query[1] * pixels[0], "*", color="tab:red", markersize=14)
    shown.set_title("image and query", fontsize=9)
    kept.imshow(found.diagonal().numpy())
    kept.set_title("diagonal of the sum", fontsize=9)
    titles = [*(route.replace("_", " ") for route in found.routes), "sum"]
    heat = [*reached.from_query(query), found.from_query(query).sum(0)]
    for axes, title, values in zip(upper, titles, heat, strict=True):
        axes.imshow(values.numpy())
        axes.plot(
            int(query[0] * found.size[1]), int(query[1] * found.size[0]), "*", color="tab:red", markersize=10
        )
        axes.set_title(f"query: {title}", fontsize=9)
    for axes, title, values in zip(lower, titles, [*reached.maps, found.merged()], strict=True):
        axes.imshow(values.numpy())
        axes.set_title(f"map: {title}", fontsize=9)
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=120)
