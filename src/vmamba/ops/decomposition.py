"""The operator as plain aten, for torch.export: `chunked`'s pairs in functional form, for symbolic sizes.

B batch, H height, W width, L = H·W, D channels, K routes, N state size, R rank of delta.

The number of operations may not depend on L here. Groups of `GROUP` neighbours, a fixed number, are combined
up and down a tree; from group to group the carry is found by doubling: step s takes in 2^s groups more.
"""

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.ops._routes import route_order, scan_order
from vmamba.ops._validate import state_dtype, validate
from vmamba.ops.reference import softplus

GROUP, DOUBLINGS = 64, 15
MAX_LENGTH = (2**DOUBLINGS - 1) * GROUP
"""Two million positions: an image of 5,792 by 5,792 pixels at a stem's stride of 4."""


def scan(a: Tensor, b: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + b_t along dimension -2 from h = 0; all (..., L, D), L up to `MAX_LENGTH`."""
    length = b.shape[-2]
    # No symbolic size may be 1, for export would guard on it: hence a group more than is needed.
    groups = length // GROUP + 2
    padding = (0, 0, 0, groups * GROUP - length)
    h = _scan_groups(
        F.pad(a, padding).unflatten(-2, (groups, GROUP)), F.pad(b, padding).unflatten(-2, (groups, GROUP))
    )
    # A copy in plain layout: whether the slice is contiguous depends on L, and export would guard on it.
    return h.flatten(-3, -2)[..., :length, :].clone(memory_format=torch.contiguous_format)


def _scan_groups(a: Tensor, b: Tensor) -> Tensor:
    """`scan` of (..., groups, size, D) along groups·size, size a power of two."""
    groups, size = b.shape[-3], b.shape[-2]
    if size == 1:
        for step in range(DOUBLINGS):
            shift = (0, 0, 0, 0, 2**step, 0)
            b = b + a * F.pad(b, shift)[..., :groups, :, :]
            a = a * F.pad(a, shift)[..., :groups, :, :]
        return b
    a_first, a_second = a.unflatten(-2, (size // 2, 2)).unbind(-2)
    b_first, b_second = b.unflatten(-2, (size // 2, 2)).unbind(-2)
    second = _scan_groups(a_second * a_first, a_second * b_first + b_second)
    carry = F.pad(second[..., -1:, :], (0, 0, 0, 0, 1, 0))[..., :groups, :, :]
    before = torch.cat((carry, second[..., :-1, :]), -2)
    return torch.stack((a_first * before + b_first, second), -2).flatten(-3, -2)


def selective_scan_2d(
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
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """y (B, H, W, D) in `out_dtype` (None: the state's type) and the last state (B, K, D, N).

    Raises:
        TypeError: As the operator.
        ValueError: As the operator; also for more than `MAX_LENGTH` positions, where L is known.
    """
    validate(x, delta, A, B, C, D, delta_bias, delta_weight, routes, initial_state, out_dtype)
    dtype = state_dtype(x)
    height, width = x.shape[1], x.shape[2]
    length = height * width
    if isinstance(length, int) and length > MAX_LENGTH:
        raise ValueError(f"x: expected at most {MAX_LENGTH} positions for export, got {height}·{width}")
    order = scan_order(routes, height, width, x.device)
    route = torch.arange(len(routes), device=x.device)[:, None]
    # Where autocast is off, the context would still leave a region of its own in the exported graph.
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        u = x.flatten(1, 2)[:, order].to(dtype)  # (B, K, L, D)
        z = delta.flatten(1, 2)[:, order, route].to(dtype)
        if delta_weight is not None:
            z = z @ delta_weight.to(dtype).transpose(1, 2)
        if delta_bias is not None:
            z = z + delta_bias.to(dtype)[:, None]
        d = softplus(z) if delta_softplus else z
        b_in = B.flatten(1, 2)[:, order, route].to(dtype).transpose(2, 3)  # (B, K, N, L)
        c_out = C.flatten(1, 2)[:, order, route].to(dtype).transpose(2, 3)
        a = torch.exp(d[:, :, None] * A.to(dtype).transpose(1, 2)[:, :, None])  # (B, K, N, L, D)
        b = (d * u)[:, :, None] * b_in[..., None]
        if initial_state is not None:
            entering = a[..., :1, :] * initial_state.to(dtype).transpose(2, 3)[..., None, :]
            b = b + F.pad(entering, (0, 0, 0, length - 1))
        h = scan(a, b)
        out = (h * c_out[..., None]).sum(2)
        if D is not None:
            out = out + u * D.to(dtype)[:, None]
        y = torch.zeros_like(u[:, 0])
        for k, code in enumerate(routes):
            y = y.index_add(1, route_order(code, height, width, x.device), out[:, k])
    return y.unflatten(1, (height, width)).to(out_dtype or dtype), h[..., -1, :].transpose(2, 3)
