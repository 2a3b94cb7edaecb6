"""The operator as plain aten, for torch.export and torch.func: `chunked`'s pairs in functional form.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes, n state size, r rank of delta.

It serves symbolic sizes, so the number of operations may not depend on l. Within a block of `BLOCK`
positions, a fixed number, pairs are combined up and down a tree; the carry from block to block is computed by
doubling: step s combines each block with the one 2^s before it.

Each operation is a node of an exported graph: hence slices by `narrow`, which leaves the other axes alone,
and no change of a type to itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.ops.operands import Operands
from vmamba.ops.reference import softplus
from vmamba.ops.routes import CROSS, GIVEN, route_codes, scan_order

BLOCK, DOUBLINGS = 64, 15
MAX_LENGTH = (2**DOUBLINGS - 1) * BLOCK
"""Two million positions: an image of 5,792 by 5,792 pixels at a stem's stride of 4."""


def recurrence(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along dimension -2 from h = 0; all (…, l, d), l up to `MAX_LENGTH`."""
    length = b.shape[-2]
    # One block more than needed: export would guard on a symbolic size that may be 1.
    blocks = length // BLOCK + 2
    padding = (0, 0, 0, blocks * BLOCK - length)
    h = _recurrence_in_blocks(
        F.pad(a, padding).unflatten(-2, (blocks, BLOCK)), F.pad(b, padding).unflatten(-2, (blocks, BLOCK))
    )
    # A contiguous copy: whether the slice is contiguous depends on l, and export would guard on it.
    return h.flatten(-3, -2).narrow(-2, 0, length).clone(memory_format=torch.contiguous_format)


def _recurrence_in_blocks(a: Tensor, b: Tensor) -> Tensor:
    """`recurrence` of (…, blocks, size, d) along blocks·size, size a power of two."""
    blocks, size = b.shape[-3], b.shape[-2]
    if size == 1:
        for step in range(DOUBLINGS):
            if isinstance(blocks, int) and 2**step >= blocks:
                break  # the first block has reached the last
            shift = (0, 0, 0, 0, 2**step, 0)
            b = b + a * F.pad(b, shift).narrow(-3, 0, blocks)
            a = a * F.pad(a, shift).narrow(-3, 0, blocks)
        return b
    a, b = a.unflatten(-2, (size // 2, 2)), b.unflatten(-2, (size // 2, 2))
    a_first, a_second, b_first, b_second = a.select(-2, 0), a.select(-2, 1), b.select(-2, 0), b.select(-2, 1)
    second = _recurrence_in_blocks(a_second * a_first, a_second * b_first + b_second)
    carry = F.pad(second.narrow(-2, size // 2 - 1, 1), (0, 0, 0, 0, 1, 0)).narrow(-3, 0, blocks)
    before = torch.cat((carry, second.narrow(-2, 0, size // 2 - 1)), -2)
    return torch.stack((a_first * before + b_first, second), -2).flatten(-3, -2)


def scan(call: Operands, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """y (b, h, w, d) in `out_dtype` (None: the state's type) and the last state (b, k, d, n).

    Raises:
        TypeError: As the operator.
        ValueError: As the operator; also for more than `MAX_LENGTH` positions, unless l is symbolic.
    """
    call.validate(out_dtype)
    if isinstance(call.length, int) and call.length > MAX_LENGTH:
        raise ValueError(
            f"x: expected at most {MAX_LENGTH} positions for export and torch.func, "
            f"got {call.x.shape[1]}·{call.x.shape[2]}"
        )
    # Where autocast is off, the context would still leave a region of its own in the exported graph.
    device_type = call.device.type
    autocast = torch.is_autocast_enabled(device_type)
    with torch.autocast(device_type, enabled=False) if autocast else nullcontext():
        order = call.order()
        u = call.x.flatten(1, 2).index_select(1, order.flatten()).unflatten(1, order.shape)  # (b, k, l, d)
        u = _cast(u, call.state_dtype)
        h, out = _along_routes(call, order, u)
        y = torch.zeros_like(u[:, 0])
        for k in range(call.n_routes):
            y = y.index_add(1, order[k], out[:, k])
    y = _cast(y.unflatten(1, (call.x.shape[1], call.x.shape[2])), out_dtype or call.state_dtype)
    return y, h[..., -1, :].transpose(2, 3)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)


def _along_routes(call: Operands, order: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The states (b, k, n, l, d) and the outputs (b, k, l, d) of every route, in its own order."""
    dtype, routes = call.state_dtype, call.n_routes
    # Each step's position and route as one index, for index_select: the gradient of indexing with a tensor
    # writes in place, which vmap refuses.
    rows = (order * routes + torch.arange(routes, device=order.device)[:, None]).flatten()

    def visited(t: Tensor) -> Tensor:
        """(b, h, w, k, ·) in the order of each route, (b, k, l, ·)."""
        return _cast(t.flatten(1, 3).index_select(1, rows).unflatten(1, order.shape), dtype)

    z = visited(call.delta)
    if call.delta_weight is not None:
        z = z @ _cast(call.delta_weight, dtype).transpose(1, 2)
    if call.delta_bias is not None:
        z = z + _cast(call.delta_bias, dtype).unsqueeze(1)
    delta = softplus(z) if call.delta_softplus else z
    B, C = visited(call.B).transpose(2, 3), visited(call.C).transpose(2, 3)  # (b, k, n, l)
    A = _cast(call.A, dtype).transpose(1, 2).unsqueeze(2)
    decay = torch.exp(delta.unsqueeze(2) * A)  # (b, k, n, l, d)
    drive = (delta * u).unsqueeze(2) * B.unsqueeze(-1)
    if call.initial_state is not None:
        entering = decay.narrow(-2, 0, 1) * _cast(call.initial_state, dtype).transpose(2, 3).unsqueeze(-2)
        drive = drive + F.pad(entering, (0, 0, 0, call.length - 1))
    h = recurrence(decay, drive)
    out = (h * C.unsqueeze(-1)).sum(2)
    if call.D is not None:
        out = out + u * _cast(call.D, dtype).unsqueeze(1)
    return h, out


def selective_scan_2d(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`scan` with the operator's arguments by position, up to `out_dtype`."""
    *operands, out_dtype = arguments
    return scan(Operands(*operands), out_dtype)


_KEPT_WHOLE = ContextVar("vmamba_kept_whole", default=False)


@contextmanager
def kept_whole() -> Iterator[None]:
    """Inside the block `torch.export.export(…, strict=False)` keeps SS2D's scan as a call of the operator.

    It is then left to whoever translates the exported graph, such as `vmamba.export`.
    """
    token = _KEPT_WHOLE.set(True)
    try:
        yield
    finally:
        _KEPT_WHOLE.reset(token)


def exported(x: Tensor, *arguments: Any) -> Tensor:
    """What SS2D's scan becomes in an exported graph, y (b, h, w, d): plain aten, or the operator itself.

    Args:
        x: (b, h, w, d).
        arguments: The other arguments of the operator, up to `out_dtype`.
    """
    if not _KEPT_WHOLE.get():
        return selective_scan_2d(x, *arguments)[0]
    *operands, routes, initial_state, out_dtype = arguments
    named = route_codes(CROSS)
    # The order of a registered route is known in Python alone; in the graph it becomes a permutation.
    other = [code for code in routes if code not in named]
    orders = scan_order(other, x.shape[1], x.shape[2], x.device) if other else None
    codes = [code if code in named else GIVEN for code in routes]
    y, _, _ = torch.ops.vmamba.selective_scan_2d(x, *operands, codes, initial_state, out_dtype, None, orders)
    return y
