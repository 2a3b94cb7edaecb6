"""Activation maps (Figures 4-7): a scan as attention, from every position to all positions before it.

Along a route, with Q = C, K = B and V = δx (equation 19), position i receives from position j ≤ i, in
channel d,

    Σ_n C[i,n] B[j,n] exp(A[d,n] (S[i,d] − S[j,d])) δ[j,d] x[j,d],    S the running sum of δ.

A map holds some factors of this, averaged over channels: `CB` is Q Kᵀ alone, `ww` the decay alone, `CwBw`
both.

h height, w width, l = h·w positions, d channels, k routes, n state size, r rank of delta.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vmamba.analysis.scans import Scan, record_scans
from vmamba.errors import UserError
from vmamba.ops.reference import softplus

KINDS = ("CB", "CwBw", "ww")
_VALUES_AT_ONCE = 2**23
_STAGE_AND_BLOCK = re.compile(r"stages[._](\d+)\.(?:blocks\.)?(\d+)(?=\.|$)")
"""Matches stage and block in a module's name, in VMamba and in timm's wrappers for features."""


class ActivationError(UserError, ValueError):
    """The requested maps do not exist."""


@dataclass(frozen=True)
class ActivationMaps:
    """The maps of one scan of one image.

    Attributes:
        maps: (k, l, l), float32; row i of a route is what its i-th position receives from each position, 0
            above the diagonal.
        orders: (k, l), the flat image positions (row·w + column) as each route visits them.
        routes: The name of each route.
        size: (h, w).
    """

    maps: Tensor
    orders: Tensor
    routes: tuple[str, ...]
    size: tuple[int, int]

    def merged(self, *, scale_each: bool = False) -> Tensor:
        """The sum over routes, or the mean of the scaled maps, (l, l), rows and columns in image order."""
        total = torch.zeros_like(self.maps[0])
        for route, order in zip(self.maps, self.orders, strict=True):
            total[order[:, None], order] += scaled(route) / len(self.maps) if scale_each else route
        return total

    def diagonal(self) -> Tensor:
        """What each position receives from itself, over all routes, (h, w): the heat map of Figure 5 (c)."""
        return self.merged().diagonal().view(self.size)

    def from_query(self, query: tuple[float, float]) -> Tensor:
        """What one position receives from each position: a heat map for each route, (k, h, w).

        Args:
            query: (x, y) of the position over width and height, each in [0, 1).

        Raises:
            ActivationError: The position lies outside of the image.
        """
        x, y = query
        if not (0 <= x < 1 and 0 <= y < 1):
            raise ActivationError(f"query: expected x and y in [0, 1), got {query}")
        height, width = self.size
        position = int(y * height) * width + int(x * width)
        heat_maps = torch.zeros_like(self.maps[:, 0])
        for heat, route, order in zip(heat_maps, self.maps, self.orders, strict=True):
            heat[order] = route[order == position][0]
        return heat_maps.view(-1, height, width)


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
    module: str | None = None,
    kind: str = "CwBw",
    with_delta: bool = False,
) -> ActivationMaps:
    """The activation maps of one SS2D on one image; by default of the block that the paper shows.

    Computes l²·d·n exponentials for each route: seconds for VMamba-T at 512², where l is 1,024.

    Args:
        model: Any model that contains SS2Ds; it runs in evaluation mode.
        image: Normalised, (channels, height, width); the paper's is 512².
        stage: Index of the stage, for models whose SS2Ds are in `stages`.
        block: Index of the block in its stage.
        module: Name of the SS2D, or of a module with one SS2D in it, instead of stage and block.
        kind: "CB", "CwBw" or "ww".
        with_delta: Multiply each column by its δ.

    Raises:
        ActivationError: There is no such SS2D, its scan does not read whole images (as the cascade's does
            not), `kind` is unknown, or the image has not three dimensions.
    """
    if kind not in KINDS:
        raise ActivationError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if image.ndim != 3:
        raise ActivationError(f"image: expected (channels, height, width), got shape {tuple(image.shape)}")
    parameter = next(model.parameters())
    scans = record_scans(model, image[None].to(parameter.device, parameter.dtype))
    if not scans:
        raise ActivationError(f"model: expected one with selective scans, {type(model).__name__} has none")
    name = _by_index(list(scans), stage, block) if module is None else _by_name(list(scans), module)
    if len(scans[name]) > 1 or len(scans[name][0].call.x) > 1:
        raise ActivationError(
            f"{name}: there is no map over the whole image, since it scans more than once or line by line, "
            "as the cascade does"
        )
    return _maps(scans[name][0], kind, with_delta)


def _by_index(names: list[str], stage: int, block: int) -> str:
    """The name of the module that scans in a block of a stage."""
    places = {name: _STAGE_AND_BLOCK.search(name) for name in names}
    by_index = {(int(place[1]), int(place[2])): name for name, place in places.items() if place}
    if not by_index:
        raise ActivationError(f"stage, block: the model has no stages; give module, one of {_listed(names)}")
    if (stage, block) not in by_index:
        blocks = [sum(s == index for s, _ in by_index) for index in range(max(by_index)[0] + 1)]
        raise ActivationError(
            f"stage, block: there is no block {block} in stage {stage} with a scan; the stages have {blocks}"
        )
    return by_index[stage, block]


def _by_name(names: list[str], module: str) -> str:
    """The scanning module of this name, or the only scanning module inside the module of this name."""
    matching = [name for name in names if name == module or name.startswith(f"{module}.") or not module]
    if len(matching) != 1:
        raise ActivationError(
            f"module: expected the name of a module with one SS2D, {module!r} has {len(matching)}; the SS2Ds "
            f"are {_listed(names)}"
        )
    return matching[0]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _maps(scan: Scan, kind: str, with_delta: bool) -> ActivationMaps:
    """The maps of every route of a scan of one image."""
    call = scan.call
    _, height, width, _ = call.x.shape
    delta, B, C = (t[0].flatten(0, 1).float() for t in (call.delta, call.B, call.C))  # (l, k, ·)
    maps = []
    orders = call.order()
    for k, order in enumerate(orders):
        z = delta[:, k][order]
        if call.delta_weight is not None:
            z = z @ call.delta_weight[k].float().T
        if call.delta_bias is not None:
            z = z + call.delta_bias[k].float()
        z = softplus(z) if call.delta_softplus else z
        maps.append(_map(z, call.A[k].float(), B[:, k][order], C[:, k][order], kind, with_delta))
    return ActivationMaps(torch.stack(maps).cpu(), orders.cpu(), scan.route_names, (height, width))


def _map(delta: Tensor, A: Tensor, B: Tensor, C: Tensor, kind: str, with_delta: bool) -> Tensor:
    """One route's map, (l, l), from delta (l, d), A (d, n), B and C (l, n), all in the route's order."""
    if kind == "CB":
        product = C @ B.T
        return (product * delta.mean(1) if with_delta else product).tril()
    length, channels = delta.shape
    total = delta.new_zeros(length, length)
    time = delta.cumsum(0, dtype=torch.float64)
    step = max(1, _VALUES_AT_ONCE // (length * channels))
    for start in range(0, length, step):
        rows, columns = slice(start, start + step), slice(0, start + step)
        # Relative to the first row, so that float32 is precise wherever the decay is not 0.
        since = (time[columns] - time[start]).float()
        span = (since[rows, None] - since).clamp_min_(0)  # (rows, columns, d)
        for n in range(A.shape[1]):
            decay = torch.exp(span * A[:, n])
            mean = (decay * delta[columns]).mean(-1) if with_delta else decay.mean(-1)
            total[rows, columns] += mean if kind == "ww" else mean * C[rows, n, None] * B[columns, n]
    return total.tril()


def draw(maps: ActivationMaps, image: Tensor, query: tuple[float, float], path: str | Path) -> None:
    """Write maps as a PNG: above, what a query patch receives from the image; below, the full maps.

    Each picture has its own scale; positions that a route has not reached yet are blank.

    Args:
        maps: From `activation_maps`.
        image: To show, (channels, height, width), in [0, 1].
        query: (x, y) of the patch, each in [0, 1).
        path: Of the picture.

    Raises:
        ActivationError: The query lies outside of the image.
    """
    from matplotlib.figure import Figure

    length, columns = maps.maps.shape[1], len(maps.routes) + 2
    unreached = torch.full((length, length), torch.nan).triu(1)  # NaN is left blank
    reached = replace(maps, maps=maps.maps + unreached)
    figure = Figure(figsize=(2.4 * columns, 5.4), layout="constrained")
    (image_axes, *query_axes), (diagonal_axes, *map_axes) = figure.subplots(2, columns)
    channels, height, width = image.shape
    image_axes.imshow(image.permute(1, 2, 0).numpy() if channels == 3 else image[0].numpy(), cmap="gray")
    image_axes.plot(query[0] * width, query[1] * height, "*", color="tab:red", markersize=14)
    image_axes.set_title("image and query", fontsize=9)
    diagonal_axes.imshow(maps.diagonal().numpy())
    diagonal_axes.set_title("diagonal of the sum", fontsize=9)
    titles = [*(route.replace("_", " ") for route in maps.routes), "sum"]
    star = int(query[0] * maps.size[1]), int(query[1] * maps.size[0])
    heat_maps = [*reached.from_query(query), maps.from_query(query).sum(0)]
    for axes, title, values in zip(query_axes, titles, heat_maps, strict=True):
        axes.imshow(values.numpy())
        axes.plot(*star, "*", color="tab:red", markersize=10)
        axes.set_title(f"query: {title}", fontsize=9)
    for axes, title, values in zip(map_axes, titles, [*reached.maps, maps.merged()], strict=True):
        axes.imshow(values.numpy())
        axes.set_title(f"map: {title}", fontsize=9)
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, dpi=120)
