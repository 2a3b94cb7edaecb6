"""A scan seen as attention (Figures 4-7): what each position receives from the positions before it.

Along a route, with Q = C, K = B and V = δx (equation 19), position i receives from position j ≤ i, in
channel d,

    Σ_n C[i,n] B[j,n] exp(A[d,n] (S[i,d] − S[j,d])) δ[j,d] x[j,d],    S the running sum of δ,

and beside it Σ_n C[i,n] exp(A[d,n] S[i,d]) h[d,n] from the state h before the route. A map holds some of the
factors, averaged over channels. Differences of S are summed as such: nothing is divided by a running decay.

h height, w width, l = h·w positions, d channels, k routes, n state size, r rank of delta.
"""

import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vmamba.analysis.memory import lacking_memory
from vmamba.analysis.scans import Scan, record_scans, watching_scans
from vmamba.errors import UserError
from vmamba.nn.modes import evaluating
from vmamba.ops.reference import preactivation, softplus
from vmamba.words import listed

KINDS = {
    "CB": "Q Kᵀ",
    "CwBw": "(Q ⊙ w)(K / w)ᵀ: Q Kᵀ with the decay along the route",
    "ww": "the decay alone",
}
"""The factors that a map can hold, by the names that the paper's authors use."""

_VALUES_AT_ONCE = 2**23
_STAGE_AND_BLOCK = re.compile(r"stages[._](\d+)\.(?:blocks\.)?(\d+)(?=\.|$)")
"""Matches stage and block in a module's name, in VMamba and in timm's wrappers for features."""


class AttentionError(UserError, ValueError):
    """The requested maps do not exist, or do not fit into memory."""


@dataclass(frozen=True, eq=False)
class ActivationMaps:
    """The full maps of one scan of one image.

    Attributes:
        maps: (k, l, l); row i of a route is what its i-th position receives from each position, 0 above the
            diagonal.
        orders: (k, l), the flat image positions (row·w + column) as each route visits them.
    """

    maps: Tensor
    orders: Tensor

    def merged(self, *, scale_each: bool = False) -> Tensor:
        """The sum over routes, or the mean of the scaled maps, (l, l), rows and columns in image order."""
        total = torch.zeros_like(self.maps[0])
        for route, order in zip(self.maps, self.orders, strict=True):
            total[order[:, None], order] += scaled(route) / len(self.maps) if scale_each else route
        return total


@dataclass(frozen=True, eq=False)
class ScanAttention:
    """One scan of one image as attention. The factors are computed once; every method is a query of them.

    The factors are in each route's order and in the state's type, float64 where the scan's x is float64, else
    float32, on the device of the scan. What the methods return is on the CPU.

    Attributes:
        routes: The name of each route.
        orders: (k, l), the flat image positions (row·w + column) as each route visits them, on the CPU.
        size: (h, w).
        delta: (k, l, d).
        A: (k, d, n).
        B: (k, l, n), the keys.
        C: (k, l, n), the queries.
    """

    routes: tuple[str, ...]
    orders: Tensor = field(repr=False)
    size: tuple[int, int]
    delta: Tensor = field(repr=False)
    A: Tensor = field(repr=False)
    B: Tensor = field(repr=False)
    C: Tensor = field(repr=False)

    @classmethod
    def of(cls, scan: Scan) -> "ScanAttention":
        """The attention of a recorded scan.

        Raises:
            AttentionError: The scan is of several images, or of lines of one, as the cascade's are.
        """
        call = scan.call
        images, height, width, _ = call.x.shape
        if images != 1:
            raise AttentionError(f"scan: expected one of a single image, got {images} images or lines")
        orders = call.order()
        deltas = []
        for k, order in enumerate(orders):
            z = preactivation(call, k)[0, order]
            deltas.append(softplus(z) if call.delta_softplus else z)
        B, C = (
            torch.stack([t[0].flatten(0, 1)[order, k] for k, order in enumerate(orders)]).to(call.state_dtype)
            for t in (call.B, call.C)
        )
        A = call.A.to(call.state_dtype)
        return cls(scan.route_names, orders.cpu(), (height, width), torch.stack(deltas), A, B, C)

    def of_channel(self, channel: int) -> "ScanAttention":
        """The attention in one channel alone; its maps with decay and δ are the matrices of equation 19."""
        one = slice(channel, channel + 1)
        return replace(self, delta=self.delta[..., one], A=self.A[:, one])

    def position(self, query: tuple[float, float]) -> int:
        """The flat image position row·w + column of a point.

        Args:
            query: (x, y) over width and height, each in [0, 1).

        Raises:
            AttentionError: The point lies outside of the image.
        """
        x, y = query
        if not (0 <= x < 1 and 0 <= y < 1):
            raise AttentionError(f"query: expected x and y in [0, 1), got {query}")
        height, width = self.size
        return int(y * height) * width + int(x * width)

    def row(self, position: int, kind: str = "CwBw", with_delta: bool = False) -> Tensor:
        """What one position receives from each position, for every route, (k, h, w).

        Takes l·d·n exponentials a route, and memory for l·d values: no map is needed for it.

        Args:
            position: Flat image position, row·w + column.
            kind: One of `KINDS`.
            with_delta: Multiply what comes from each position by its δ.

        Raises:
            AttentionError: The position lies outside of the image, or `kind` is unknown.
        """
        _check_kind(kind)
        places = self._places(position)
        rows = [self._row(k, place, kind, with_delta) for k, place in enumerate(places)]
        return torch.stack([self._in_image(k, row) for k, row in enumerate(rows)])

    def reached(self, position: int) -> Tensor:
        """Which positions each route has visited when it comes to one, itself among them, (k, h, w), bool.

        Raises:
            AttentionError: The position lies outside of the image.
        """
        places = self._places(position)
        rows = [torch.ones(place + 1, dtype=torch.bool) for place in places]
        return torch.stack([self._in_image(k, row) for k, row in enumerate(rows)])

    def progress(
        self, route: int = 0, kind: str = "CwBw", with_delta: bool = False, steps: int = 4
    ) -> tuple[list[int], Tensor]:
        """What a route's state holds of the image on the way (Figure 6): rows at equal steps along the route.

        Args:
            route: Its index.
            kind: One of `KINDS`.
            with_delta: Multiply what comes from each position by its δ.
            steps: How many; four are at a quarter, half, three quarters and the end of the route.

        Returns:
            The flat image positions at which the route stands, and what each receives, (steps, h, w).

        Raises:
            AttentionError: `kind` is unknown.
            ValueError: There are fewer positions than steps.
        """
        _check_kind(kind)
        length = self.orders.shape[1]
        if not 1 <= steps <= length:
            raise ValueError(f"steps: expected 1 to {length}, the positions of the route, got {steps}")
        places = [length * (step + 1) // steps - 1 for step in range(steps)]
        rows = [self._in_image(route, self._row(route, place, kind, with_delta)) for place in places]
        return self.orders[route, places].tolist(), torch.stack(rows)

    def diagonal(self, kind: str = "CwBw", with_delta: bool = False) -> Tensor:
        """What each position receives from itself, over all routes, (h, w): the heat map of Figure 5 (c).

        Raises:
            AttentionError: `kind` is unknown.
        """
        _check_kind(kind)
        kept = torch.full_like(self.B[..., 0], self.A.shape[2]) if kind == "ww" else (self.C * self.B).sum(-1)
        values = kept * self.delta.mean(-1) if with_delta else kept  # the decay of a position to itself is 1
        return torch.stack([self._in_image(k, route) for k, route in enumerate(values)]).sum(0)

    def from_state(self) -> Tensor:
        """What each position of a route reads of the state before the route: Q ⊙ w, (k, l, d, n)."""
        since = self.delta.cumsum(1)
        read = self.C[:, :, None] * torch.exp(since[..., None] * self.A[:, None])
        return read.cpu()

    def maps(self, kind: str = "CwBw", with_delta: bool = False) -> ActivationMaps:
        """The full maps: l²·d·n exponentials a route, seconds for VMamba-T at 512², where l is 1,024.

        Args:
            kind: One of `KINDS`.
            with_delta: Multiply each column by its δ.

        Raises:
            AttentionError: `kind` is unknown, or the maps and their sum do not fit into memory.
        """
        _check_kind(kind)
        self.check_memory()
        routes, length = self.orders.shape
        maps = torch.empty(routes, length, length, dtype=self.B.dtype)
        for k in range(routes):
            maps[k] = self._map(k, kind, with_delta)
        return ActivationMaps(maps, self.orders)

    def check_memory(self) -> None:
        """Refuse full maps that this machine has no memory for, before they are begun.

        Raises:
            AttentionError: The maps of all routes and their sum do not fit; it says how large they are.
        """
        routes, length = self.orders.shape
        needed = (routes + 1) * length**2 * self.B.element_size()
        if (lack := lacking_memory(needed)) is not None:
            height, width = self.size
            raise AttentionError(
                f"the maps of {routes} routes over {height} x {width} positions and their sum take {lack}; "
                "take a smaller image, a later stage, or single rows alone (the command's --no-maps)"
            )

    def _places(self, position: int) -> list[int]:
        """The place of an image position along each route."""
        if not 0 <= position < self.orders.shape[1]:
            height, width = self.size
            raise AttentionError(
                f"position: expected 0 to {self.orders.shape[1] - 1} for {height} x {width} positions, got "
                f"{position}"
            )
        return (self.orders == position).int().argmax(1).tolist()

    def _in_image(self, k: int, row: Tensor) -> Tensor:
        """Values of the first positions of a route, in image order, (h, w); 0 elsewhere."""
        values = torch.zeros(self.orders.shape[1], dtype=row.dtype)
        values[self.orders[k, : len(row)]] = row.cpu()
        return values.view(self.size)

    def _row(self, k: int, place: int, kind: str, with_delta: bool) -> Tensor:
        """What the position at a place of a route receives from those up to it, (place + 1,)."""
        delta, B, C = self.delta[k, : place + 1], self.B[k, : place + 1], self.C[k, place]
        if kind == "CB":
            return B @ C * delta.mean(1) if with_delta else B @ C
        span = torch.zeros_like(delta)  # δ summed from behind each position up to the place
        span[:-1] = delta[1:].flip(0).cumsum(0).flip(0)
        row = torch.zeros_like(B[:, 0])
        for n in range(len(C)):
            decay = torch.exp_(span * self.A[k, :, n])
            mean = (decay.mul_(delta) if with_delta else decay).mean(1)
            row += mean if kind == "ww" else mean * C[n] * B[:, n]
        return row

    def _map(self, k: int, kind: str, with_delta: bool) -> Tensor:
        """One route's map, (l, l)."""
        delta, A, B, C = self.delta[k], self.A[k], self.B[k], self.C[k]
        if kind == "CB":
            product = C @ B.T
            return (product * delta.mean(1) if with_delta else product).tril_()
        length, channels = delta.shape
        total = delta.new_zeros(length, length)
        time = delta.cumsum(0, dtype=torch.float64)
        step = max(1, _VALUES_AT_ONCE // (length * channels))
        for start in range(0, length, step):
            rows, columns = slice(start, start + step), slice(0, start + step)
            # Relative to the first row, so that float32 is precise wherever the decay is not 0.
            since = (time[columns] - time[start]).to(delta.dtype)
            span = since[rows, None] - since  # (rows, columns, d)
            for n in range(A.shape[1]):
                decay = torch.exp(span * A[:, n])
                mean = (decay * delta[columns]).mean(-1) if with_delta else decay.mean(-1)
                total[rows, columns] += mean if kind == "ww" else mean * C[rows, n, None] * B[columns, n]
        return total.tril_()


def scan_attention(
    model: nn.Module, image: Tensor, *, stage: int = 2, block: int = 1, module: str | None = None
) -> ScanAttention:
    """The attention of one SS2D on one image; by default of the block that the paper shows.

    Args:
        model: Any model that contains SS2Ds; it runs in evaluation mode, once.
        image: Normalised, (channels, height, width); the paper's is 512².
        stage: Index of the stage, for models whose SS2Ds are in `stages`.
        block: Index of the block in its stage.
        module: Name of the SS2D, or of a module with one SS2D in it, instead of stage and block.

    Raises:
        AttentionError: There is no such SS2D, its scan does not read whole images (as the cascade's does
            not), or the image has not three dimensions.
    """
    if image.ndim != 3:
        raise AttentionError(f"image: expected (channels, height, width), got shape {tuple(image.shape)}")
    names: list[str] = []
    scans: list[Scan] = []  # of the chosen SS2D alone: those of all blocks take much memory at 1024²

    def keep(name: str, scan: Scan) -> None:
        if name not in names:
            names.append(name)
        if _place(name) == (stage, block) if module is None else _is_inside(name, module):
            scans.append(scan)

    parameter = next(model.parameters())
    with torch.no_grad(), evaluating(model), watching_scans(model, keep):
        model(image[None].to(parameter.device, parameter.dtype))
    if not names:
        raise AttentionError(f"model: expected one with selective scans, {type(model).__name__} has none")
    name = _by_index(names, stage, block) if module is None else _by_name(names, module)
    if len(scans) > 1 or len(scans[0].call.x) > 1:
        raise AttentionError(
            f"{name}: there is no map over the whole image, since it scans more than once (as it does with "
            "split_channels) or line by line (as the cascade does)"
        )
    return ScanAttention.of(scans[0])


def scan_names(model: nn.Module, input_size: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """The SS2Ds that `scan_attention` can show: their names and (h, w), in the order in which they run.

    Args:
        model: Any module that takes images; it runs in evaluation mode, once.
        input_size: (channels, height, width).
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    shapes = {
        name: scans[0].call.x.shape for name, scans in record_scans(model, image).items() if len(scans) == 1
    }
    return {name: (shape[1], shape[2]) for name, shape in shapes.items() if shape[0] == 1}


def scaled(values: Tensor) -> Tensor:
    """Shifted and scaled to [0, 1]; all zero if the values are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise AttentionError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")


def _place(name: str) -> tuple[int, int] | None:
    """Stage and block of a module that scans, by its name."""
    match = _STAGE_AND_BLOCK.search(name)
    return None if match is None else (int(match[1]), int(match[2]))


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.") or not module


def _by_index(names: list[str], stage: int, block: int) -> str:
    """The name of the module that scans in a block of a stage."""
    by_index = {place: name for name in names if (place := _place(name)) is not None}
    if not by_index:
        raise AttentionError(f"stage, block: the model has no stages; give module, one of {listed(names)}")
    if (stage, block) not in by_index:
        blocks = [sum(s == index for s, _ in by_index) for index in range(max(by_index)[0] + 1)]
        raise AttentionError(
            f"stage, block: there is no block {block} in stage {stage} with a scan; "
            f"stages 0, 1, … have {', '.join(map(str, blocks))} of them, counted from 0"
        )
    return by_index[stage, block]


def _by_name(names: list[str], module: str) -> str:
    """The scanning module of this name, or the only scanning module inside the module of this name."""
    matching = [name for name in names if _is_inside(name, module)]
    if len(matching) != 1:
        raise AttentionError(
            f"module: expected the name of a module with one SS2D, {module!r} has {len(matching)}; the SS2Ds "
            f"are {listed(names)}"
        )
    return matching[0]
