"""Engine `chunked`: pure PyTorch on any device, parallel within chunks of the routes.

B batch, H height, W width, L = H·W, D channels, K routes, N state size, R rank of delta, T a chunk.

All K routes advance together, a chunk of T positions at a time; what a chunk needs is gathered from image
position by the routes' order, so that nothing of size (B, K, L, …) is ever stored. Within a chunk, each pair
(a, b) of h ↦ a·h + b is combined with its neighbour as (a₂a₁, a₂b₁ + b₂), in place, up and down a binary
tree: 3·log₂ T launches, 3·T combinations, and neither a division nor a difference of cumulated sums. The
backward starts each chunk from a saved state and computes it again.

Memory beyond inputs and outputs: about a dozen values for each element of a chunk, which is at most
an eighth of the batch's positions, plus the saved states. It does not grow with N.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vmamba.ops._registry import Backend, Gradients, register, state_stride
from vmamba.ops._routes import scan_order
from vmamba.ops._validate import state_dtype

CPU_CHUNK = 2**18
"""Elements (B, K, T, D) of a chunk on a CPU: near the caches' size, and large beside the cost of a launch."""


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z) with the relative error of the logarithm.

    log1p(u) as log(w) + (u - (w - 1)) / w with w = 1 + u rounded, whose second term is what the rounding
    lost: PyTorch's own log1p takes five times as long as its log on a CPU.
    """
    u = z.clamp(max=40.0).exp_()
    w = u + 1
    lost = u.sub_(w - 1).div_(w)
    return w.log_().add_(lost).add_(z.sub(40.0).clamp_(min=0.0))  # log(1 + e^z) is z beyond 40


def scan_(a: Tensor, b: Tensor, reverse: bool = False) -> None:
    """b ← h with h_t = a_t h_{t-1} + b_t along dimension -2, in place; a is overwritten.

    Args:
        a: (..., T, D).
        b: (..., T, D).
        reverse: h_t = a_t h_{t+1} + b_t instead.
    """
    length = b.shape[-2]
    if length < 2:
        return
    odd = length % 2
    if reverse:
        first, second, rest, before = (
            slice(odd + 1, None, 2),
            slice(odd, None, 2),
            slice(1 - odd, length - 2, 2),
            slice(1 - odd, None),
        )
    else:
        first, second, rest, before = (
            slice(0, length - odd, 2),
            slice(1, None, 2),
            slice(2, None, 2),
            slice(0, length // 2 - 1 + odd),
        )
    a_second, b_second = a[..., second, :], b[..., second, :]
    b_second.addcmul_(a_second, b[..., first, :])
    a_second.mul_(a[..., first, :])
    scan_(a_second, b_second, reverse)
    b[..., rest, :].addcmul_(a[..., rest, :], b_second[..., before, :])


class _Chunk:
    """The operands of one chunk in the order of the routes and in the state's type, (B, K, T, ·)."""

    def __init__(
        self,
        order: Tensor,  # (K, T)
        x: Tensor,
        delta: Tensor,
        B: Tensor,
        C: Tensor,
        delta_bias: Tensor | None,
        delta_weight: Tensor | None,
        delta_softplus: bool,
    ) -> None:
        dtype = state_dtype(x)
        rows, columns = order // x.shape[2], order % x.shape[2]
        route = torch.arange(len(order), device=order.device)[:, None]
        self.x = x[:, rows, columns].to(dtype)
        self.B = B[:, rows, columns, route].to(dtype)
        self.C = C[:, rows, columns, route].to(dtype)
        self.delta_in = delta[:, rows, columns, route].to(dtype)  # (B, K, T, R), or (B, K, T, D) as below
        z = self.delta_in
        if delta_weight is not None:
            z = z @ delta_weight.to(dtype).transpose(1, 2)
        if delta_bias is not None:
            z = z + delta_bias.to(dtype)[:, None]
        self.z = z
        self.delta = softplus(z) if delta_softplus else z

    def decay(self, A: Tensor, n: int) -> Tensor:
        """exp(δ A) of state n; A: (K, D, N)."""
        return (self.delta * A[:, None, :, n]).exp_()

    def states(self, decay: Tensor, h: Tensor, n: int) -> Tensor:
        """h of state n after each position, given it before the first, (B, K, D); overwrites `decay`."""
        b = (self.delta * self.x).mul_(self.B[..., n, None])
        b[..., 0, :].addcmul_(decay[..., 0, :], h)
        scan_(decay, b)
        return b


def _chunk_size(x: Tensor, n_routes: int, n_state: int) -> tuple[int, int]:
    """(samples, positions) of a chunk; positions are a multiple of `state_stride` or all of them."""
    batch, height, width, channels = x.shape
    length, stride = height * width, state_stride(n_state)
    budget = max(1, batch * length // 8)
    if x.device.type == "cpu":
        budget = min(budget, max(1, CPU_CHUNK // (n_routes * channels)))
    samples = max(1, min(batch, budget // min(stride, length)))
    return samples, min(length, stride * max(1, budget // (samples * stride)))


def _chunks(samples: int, positions: int, batch: int, length: int) -> Iterator[tuple[slice, list[slice]]]:
    for i in range(0, batch, samples):
        yield (
            slice(i, min(i + samples, batch)),
            [slice(t, min(t + positions, length)) for t in range(0, length, positions)],
        )


def forward(
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
    initial_state: Tensor | None,  # (B, K, D, N)
) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.forward`."""
    dtype = state_dtype(x)
    batch, height, width, channels = x.shape
    length, n_routes, n_state = height * width, len(routes), A.shape[2]
    stride = state_stride(n_state)
    A = A.to(dtype)
    order = scan_order(routes, height, width, x.device)
    y = x.new_zeros((batch, length, channels), dtype=dtype)
    saved = x.new_empty((batch, n_routes, -(-length // stride), n_state, channels), dtype=dtype)
    last = x.new_zeros((batch, n_routes, n_state, channels), dtype=dtype)
    if initial_state is not None:
        last.copy_(initial_state.transpose(2, 3))

    samples, positions = _chunk_size(x, n_routes, n_state)
    for i, chunks in _chunks(samples, positions, batch, length):
        for t in chunks:
            chunk = _Chunk(order[:, t], x[i], delta[i], B[i], C[i], delta_bias, delta_weight, delta_softplus)
            out = torch.zeros_like(chunk.x) if D is None else chunk.x * D.to(dtype)[:, None]
            slots = saved[i, :, t.start // stride : -(-t.stop // stride)]
            slots[:, :, 0] = last[i]
            for n in range(n_state):
                h = chunk.states(chunk.decay(A, n), last[i, :, n], n)
                slots[:, :, 1:, n] = h[:, :, stride - 1 : -1 : stride]
                last[i, :, n] = h[:, :, -1]
                out.addcmul_(h, chunk.C[..., n, None])
            for k in range(n_routes):
                y[i].index_add_(1, order[k, t], out[:, k])
    return y.view(batch, height, width, channels), last.transpose(2, 3).contiguous(), saved


def backward(
    grad_y: Tensor,  # (B, H, W, D)
    grad_last_state: Tensor | None,  # (B, K, D, N)
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
    """As `Backend.backward`: g_t = C_t dy_t + exp(δ_{t+1} A) ⊙ g_{t+1}, with g_t the gradient of h_t."""
    dtype = state_dtype(x)
    batch, height, width, channels = x.shape
    length, n_routes, n_state = height * width, len(routes), A.shape[2]
    stride = state_stride(n_state)
    A = A.to(dtype)
    W = None if delta_weight is None else delta_weight.to(dtype)
    order = scan_order(routes, height, width, x.device)
    route = torch.arange(n_routes, device=x.device)[:, None]
    grad_x = x.new_zeros((batch, length, channels), dtype=dtype)
    # Each position is visited once a route, so these three are written in full.
    grad_delta = x.new_empty((batch, length, *delta.shape[3:]), dtype=dtype)
    grad_B = x.new_empty((batch, length, n_routes, n_state), dtype=dtype)
    grad_C = torch.empty_like(grad_B)
    grad_A = torch.zeros_like(A)
    grad_D = x.new_zeros(channels, dtype=dtype)  # the same for every route
    grad_bias = x.new_zeros((n_routes, channels), dtype=dtype)
    grad_W = None if W is None else torch.zeros_like(W)
    # The gradient of the state before the chunk in hand, coming from what follows.
    carry = x.new_zeros((batch, n_routes, n_state, channels), dtype=dtype)
    if grad_last_state is not None:
        carry.copy_(grad_last_state.transpose(2, 3))

    samples, positions = _chunk_size(x, n_routes, n_state)
    for i, chunks in _chunks(samples, positions, batch, length):
        grad_D += (grad_y[i].to(dtype) * x[i]).sum((0, 1, 2))
        for t in reversed(chunks):
            o = order[:, t]
            chunk = _Chunk(o, x[i], delta[i], B[i], C[i], delta_bias, delta_weight, delta_softplus)
            dy = grad_y[i, o // width, o % width].to(dtype)
            dx = torch.zeros_like(chunk.x) if D is None else dy * D.to(dtype)[:, None]
            d_delta = torch.zeros_like(chunk.x)
            dB, dC = torch.empty_like(chunk.B), torch.empty_like(chunk.C)
            for n in range(n_state):
                decay, before = chunk.decay(A, n), states[i, :, t.start // stride, n]
                scratch = decay.clone()
                h = chunk.states(scratch, before, n)
                dC[..., n] = torch.linalg.vecdot(dy, h)

                scratch[:, :, :-1] = decay[:, :, 1:]
                g = dy * chunk.C[..., n, None]
                g[:, :, -1] += carry[i, :, n]
                scan_(scratch, g, reverse=True)
                carry[i, :, n] = decay[:, :, 0] * g[:, :, 0]

                # decay ← gradient of the exponent δA: g_t ⊙ exp(δ_t A) ⊙ h_{t-1}
                decay.mul_(g)
                decay[:, :, 1:] *= h[:, :, :-1]
                decay[:, :, 0] *= before
                grad_A[..., n] += torch.mul(decay, chunk.delta, out=scratch).sum((0, 2))
                d_delta.addcmul_(decay, A[:, None, :, n])

                torch.mul(g, chunk.delta, out=scratch)
                dB[..., n] = torch.linalg.vecdot(scratch, chunk.x)
                dx.addcmul_(scratch, chunk.B[..., n, None])
                d_delta.addcmul_(g.mul_(chunk.x), chunk.B[..., n, None])
            if delta_softplus:
                d_delta.mul_(torch.sigmoid(chunk.z))
            grad_bias += d_delta.sum((0, 2))
            if W is not None and grad_W is not None:
                grad_W += torch.einsum("bktd,bktr->kdr", d_delta, chunk.delta_in)
                d_delta = d_delta @ W
            grad_delta[i][:, o, route] = d_delta
            grad_B[i][:, o, route] = dB
            grad_C[i][:, o, route] = dC
            for k in range(n_routes):
                grad_x[i].index_add_(1, o[k], dx[:, k])
    image = (batch, height, width)
    return (
        grad_x.view(*image, channels),
        grad_delta.view(*image, *delta.shape[3:]),
        grad_A,
        grad_B.view(*image, n_routes, n_state),
        grad_C.view(*image, n_routes, n_state),
        None if D is None else grad_D.expand(n_routes, -1),
        None if delta_bias is None else grad_bias,
        grad_W,
        None if initial_state is None else carry.transpose(2, 3),
    )


register(Backend("chunked", "pure PyTorch on any device, parallel within chunks", forward, backward))
