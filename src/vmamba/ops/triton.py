"""Engine `triton`: fused over routes, for GPUs; the kernels are in `triton_kernels`.

B batch, H height, W width, L = H·W, D channels, K routes, N state size, R rank of delta.

With `TRITON_INTERPRET=1` in the environment Triton interprets the kernels on the CPU, and the engine takes
CPU tensors: slow, and the way to test it without a GPU.
"""

import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from vmamba.ops._registry import Backend, Gradients, register
from vmamba.ops._validate import state_dtype

MOST_STATES = 64
"""The largest N; beyond it `chunked` serves."""

CHAIN = {"BS": 32, "BD": 32}
"""Segments and channels that a program of `chain_kernel` takes at a time."""


OLDEST = (3, 4)
"""The first Triton whose loops can be told not to hoist; without it kernels spill registers."""


@dataclass(frozen=True)
class Tile:
    """What one program works on: `height` × `width` positions and `channels` channels, by `warps` warps."""

    height: int
    width: int
    channels: int
    warps: int

    def holds(self, height: int, width: int) -> bool:
        """Whether an image is within one tile."""
        return height <= self.height and width <= self.width


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def tile_of(height: int, width: int, channels: int, dtype: torch.dtype, values: int = 2048) -> Tile:
    """A tile of at most 64 positions, near a square, and of so many values for 8 warps.

    More values do not fit the registers of every target (`python -m vmamba.ops.compile_triton`).
    """
    tall, wide = _power_of_two(height), _power_of_two(width)
    tall = min(tall, max(8, 64 // min(wide, 64)))
    wide = min(wide, 64 // tall)
    values //= torch.finfo(dtype).bits // 32
    block = min(max(8, values // (tall * wide)), 64, max(8, _power_of_two(channels)))
    return Tile(tall, wide, block, max(1, min(8, 8 * tall * wide * block // values)))


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")


def _position_stride(t: Tensor) -> int:
    """From one position to the next of an operand (B, H, W, …); 0 if that is not the same everywhere."""
    found, positions = set(), 1
    for size, stride in zip(reversed(t.shape[:3]), reversed(t.stride()[:3]), strict=True):
        if size > 1:
            found.add(stride / positions)
        positions *= size
    if not found:
        return t.shape[3:].numel()
    return int(found.pop()) if len(found) == 1 else 0


def _rows(t: Tensor) -> Tensor:
    """An operand as the kernels address it: the last stride 1, one stride over all positions."""
    return t if t.stride(-1) == 1 and _position_stride(t) else t.contiguous()


def _strides(t: Tensor) -> tuple[int, ...]:
    """Over positions, and over routes where there are any."""
    return (_position_stride(t), *t.stride()[3:-1])


class _Call:
    """The operands of one call, as the kernels take them."""

    def __init__(
        self,
        x: Tensor,  # (B, H, W, D)
        delta: Tensor,  # (B, H, W, K, D), or (B, H, W, K, R) with delta_weight
        A: Tensor,  # (K, D, N)
        B: Tensor,  # (B, H, W, K, N)
        C: Tensor,  # (B, H, W, K, N)
        D: Tensor | None,  # (K, D)
        delta_bias: Tensor | None,  # (K, D)
        delta_weight: Tensor | None,  # (K, D, R)
        delta_softplus: bool,
        routes: list[int],
    ) -> None:
        import triton.language as tl

        def parameter(t: Tensor | None) -> Tensor:
            """(K, D, ·) → (K, ·, D), others as they are; x stands for one that is not given."""
            return x if t is None else (t.mT if t.ndim == 3 else t).to(self.dtype).contiguous()

        self.x, self.delta, self.B, self.C = map(_rows, (x, delta, B, C))
        self.dtype = state_dtype(x)
        _, *size = x.shape
        self.tile = tile = tile_of(size[0], size[1], size[2], self.dtype)
        self.A, self.D, self.bias, self.weight = map(
            parameter, (A, None if D is None else D.to(self.dtype).sum(0), delta_bias, delta_weight)
        )
        self.operands = (self.x, self.delta, self.A, self.B, self.C, self.D, self.bias, self.weight)
        self.strides = tuple(n for t in (self.x, self.delta, self.B, self.C) for n in _strides(t))
        self.batch, self.height, self.width, self.channels = x.shape
        self.n_routes, self.n_state = len(routes), A.shape[2]
        tiles_h, tiles_w = -(-self.height // tile.height), -(-self.width // tile.width)
        self.tiles = self.batch * tiles_h * tiles_w
        self.blocks = -(-self.channels // tile.channels)
        self.segments = (self.height * tiles_w, self.width * tiles_h)  # of rows, of columns
        self.whole = tile.holds(self.height, self.width)
        self.rank = 0 if delta_weight is None else delta_weight.shape[2]
        self.sizes = (self.height, self.width, self.channels, 1 if self.whole else max(self.segments))
        self.routes = (sum(code << (2 * k) for k, code in enumerate(routes)), len(routes), self.n_state)
        self.constants = {
            "STATE": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "TH": tile.height,
            "TW": tile.width,
            "BD": tile.channels,
            "LOW_RANK": delta_weight is not None,
            "HAS_BIAS": delta_bias is not None,
            "SOFTPLUS": delta_softplus,
        }
        self.has_D = D is not None

    def empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=self.dtype)

    def per_channel(self, t: Tensor | None) -> Tensor | None:
        """(B, K, D, N) → (B, K, N, D)."""
        return None if t is None else t.mT.to(self.dtype).contiguous()

    def carry(self, first: Tensor | None, adjoint_of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The state before each segment, (B, K, segments, N, D), and the last one, (B, K, N, D).

        first: the state before the first, (B, K, N, D); None: 0.
        adjoint_of: the gradient of y; the adjoint states along the reversed routes are meant then.
        """
        from vmamba.ops import triton_kernels as kernels

        shape = (self.batch, self.n_routes, max(self.segments), self.n_state, self.channels)
        factor, summand, carry = (self.empty(*shape) for _ in range(3))
        last = self.empty(*shape[:2], *shape[3:])
        read, weight = (self.x, self.B) if adjoint_of is None else (adjoint_of, self.C)
        tile = tile_of(
            self.height, self.width, self.channels, self.dtype, 4096
        )  # the same positions as self.tile, and lighter on registers
        kernels.summary_kernel[(self.tiles, -(-self.channels // tile.channels))](
            *(read, self.delta, self.A, weight, self.bias, self.weight, factor, summand),
            *(
                *_strides(read),
                *_strides(self.delta),
                *_strides(weight),
                *self.sizes,
                *self.routes,
                self.rank,
            ),
            **{**self.constants, "BD": tile.channels},
            ADJOINT=adjoint_of is not None,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
        kernels.chain_kernel[(self.batch * self.n_routes, -(-self.channels // CHAIN["BD"]), self.n_state)](
            *(factor, summand, carry if first is None else first, carry, last),
            *(self.channels, shape[2], *self.segments, *self.routes),
            STATE=self.constants["STATE"],
            HAS_INITIAL=first is not None,
            **CHAIN,
            num_warps=4,
            enable_fp_fusion=True,
        )
        return carry, last


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    delta_softplus: bool,
    routes: list[int],
    initial_state: Tensor | None,  # (B, K, D, N)
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.forward`; no state is saved."""
    from vmamba.ops import triton_kernels as kernels

    call = _Call(x, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, routes)
    y = call.empty(*x.shape)
    carry = call.per_channel(initial_state)
    last = call.empty(call.batch, call.n_routes, call.n_state, call.channels)
    if not call.whole:
        carry, last = call.carry(carry)
    kernels.output_kernel[(call.tiles, call.blocks)](
        *(*call.operands, y if carry is None else carry, y, last),
        *(*call.strides, *call.sizes, *call.routes, call.rank),
        **call.constants,
        HAS_D=call.has_D,
        HAS_CARRY=carry is not None,
        WHOLE=call.whole,
        num_warps=call.tile.warps,
        enable_fp_fusion=True,
    )
    return y, last.mT.contiguous(), call.empty(call.batch, call.n_routes, 0, call.n_state, call.channels)


def backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    delta_softplus: bool,
    routes: list[int],
    initial_state: Tensor | None,
    states: Tensor,
) -> Gradients:
    """As `Backend.backward`."""
    from vmamba.ops import triton_kernels as kernels

    call = _Call(x, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, routes)
    grad_y = grad_y.contiguous()
    carry, adjoint = call.per_channel(initial_state), call.per_channel(grad_last)
    batch, n_routes, n_state, channels = call.batch, call.n_routes, call.n_state, call.channels
    grad_initial = call.empty(batch, n_routes, n_state, channels)
    if not call.whole:
        carry, _ = call.carry(carry)
        adjoint, grad_initial = call.carry(adjoint, grad_y)
    rank = call.rank
    grad_x = x.new_empty(x.shape)
    grad_delta = delta.new_empty(delta.shape if delta_weight is None else 0)
    rows = call.empty(call.blocks, *B.shape[:4], 2 * n_state + rank)
    shares = call.empty(call.tiles, n_routes, n_state + 1 + rank, channels)
    grad_D = call.empty(call.tiles, channels)
    kernels.gradient_kernel[(call.tiles, call.blocks)](
        *call.operands,
        *(x if carry is None else carry, x if adjoint is None else adjoint, grad_y),
        *(grad_x, grad_delta, rows, shares, grad_D, grad_initial),
        *(*call.strides, batch, *call.sizes, *call.routes, call.rank),
        **call.constants,
        HAS_D=call.has_D,
        HAS_CARRY=carry is not None,
        HAS_ADJOINT=adjoint is not None,
        WHOLE=call.whole,
        num_warps=call.tile.warps,
        enable_fp_fusion=True,
    )
    grad_B, grad_C, grad_low = total(rows).split((n_state, n_state, rank), -1)
    grad_A, grad_bias, grad_weight = total(shares).split((n_state, 1, rank), 1)
    return (
        grad_x,
        grad_delta if delta_weight is None else grad_low,
        grad_A.mT,
        grad_B,
        grad_C,
        None if D is None else total(grad_D).expand(n_routes, -1),
        None if delta_bias is None else grad_bias[:, 0],
        None if delta_weight is None else grad_weight.mT,
        None if initial_state is None else grad_initial.mT,
    )


def total(shares: Tensor) -> Tensor:
    """The sum over the first dimension, in a fixed order."""
    return shares[0] if len(shares) == 1 else shares.sum(0)


_DISTRIBUTIONS = ("triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "pytorch-triton", "triton-windows")


@cache
def _version() -> tuple[int, ...] | None:
    """Of Triton, without importing it; None where it is not installed or does not say."""
    for name in _DISTRIBUTIONS:
        try:
            return tuple(int(part) for part in re.findall(r"\d+", metadata.version(name))[:2])
        except metadata.PackageNotFoundError:
            continue
    return None


def _why_not_here() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's builds for NVIDIA, AMD and Intel GPUs"
    version = _version()
    if version is not None and version < OLDEST:
        return (
            f"it needs Triton {'.'.join(map(str, OLDEST))} (PyTorch 2.8), found {'.'.join(map(str, version))}"
        )
    if not (interpreted() or torch.cuda.is_available() or torch.xpu.is_available()):
        return "there is no GPU; TRITON_INTERPRET=1 in the environment interprets it on the CPU, for tests"
    return None


def _why_not(device: torch.device, n_state: int) -> str | None:
    if device.type not in (("cpu",) if interpreted() else ("cuda", "xpu")):
        return f"it runs on a GPU, the operands are on {device}"
    if n_state > MOST_STATES:
        return f"it takes a state size N of at most {MOST_STATES}, got {n_state}"
    return None


register(
    Backend(
        "triton",
        "Triton kernels for GPUs, fused over routes; not yet run on one, and never chosen by itself",
        forward,
        backward,
        _why_not_here,
        _why_not,
        saves_states=False,
    )
)
