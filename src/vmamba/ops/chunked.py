"""Backend `chunked`: pure PyTorch on any device, parallel within chunks of the routes.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes, n state size, r rank of delta,
t positions of a chunk.

All k routes advance together, a chunk of t positions at a time; what a chunk needs is gathered from image
position by the routes' order, so that nothing of size (b, k, l, …) is ever stored. Within a chunk, each pair
(a, b) of h ↦ a·h + b is combined with its neighbour as (a₂a₁, a₂b₁ + b₂), in place, up and down a binary
tree: 3·log₂ t launches, 3·t combinations, and neither a division nor a difference of cumulated sums. The
backward recomputes each chunk from a saved state.

Memory beyond inputs and outputs: about a dozen values for each element of a chunk, which is at most
an eighth of the batch's positions, plus the saved states. It does not grow with n.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vmamba.ops.backend import Backend, Gradients, saved_every_stride, state_stride
from vmamba.ops.operands import Operands
from vmamba.ops.reference import softplus

CPU_CHUNK = 2**18
"""Elements (b, k, t, d) of a chunk on a CPU: near the caches' size, and large beside the cost of a launch."""


def recurrence_(a: Tensor, b: Tensor, reverse: bool = False) -> None:
    """b ← h with h_t = a_t h_{t-1} + b_t along dimension -2, in place; a is overwritten.

    Args:
        a: (…, t, d).
        b: (…, t, d).
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
    recurrence_(a_second, b_second, reverse)
    b[..., rest, :].addcmul_(a[..., rest, :], b_second[..., before, :])


class _Chunk:
    """The operands of one chunk in the order of the routes and in the state's type, (b, k, t, ·).

    Args:
        call: The call.
        images: Of the batch.
        order: (k, t), the flat positions that the routes visit.
    """

    def __init__(self, call: Operands, images: slice, order: Tensor) -> None:
        dtype, width = call.state_dtype, call.x.shape[2]
        rows, columns = order // width, order % width
        route = torch.arange(len(order), device=order.device)[:, None]
        self.x = call.x[images][:, rows, columns].to(dtype)
        self.B = call.B[images][:, rows, columns, route].to(dtype)
        self.C = call.C[images][:, rows, columns, route].to(dtype)
        self.delta_in = call.delta[images][:, rows, columns, route].to(dtype)  # its last size is r or d
        z = self.delta_in
        if call.delta_weight is not None:
            z = z @ call.delta_weight.to(dtype).transpose(1, 2)
        if call.delta_bias is not None:
            z = z + call.delta_bias.to(dtype)[:, None]
        self.z = z
        self.delta = softplus(z) if call.delta_softplus else z
        self.D = None if call.D is None else call.D.to(dtype)[:, None]

    def skip(self, t: Tensor) -> Tensor:
        """D ⊙ t; zero without D."""
        return torch.zeros_like(t) if self.D is None else t * self.D

    def decay(self, A: Tensor, n: int) -> Tensor:
        """exp(δ A) of state n; A: (k, d, n)."""
        return (self.delta * A[:, None, :, n]).exp_()

    def states(self, decay: Tensor, h: Tensor, n: int) -> Tensor:
        """h of state n after each position, given it before the first, (b, k, d); overwrites `decay`."""
        b = (self.delta * self.x).mul_(self.B[..., n, None])
        b[..., 0, :].addcmul_(decay[..., 0, :], h)
        recurrence_(decay, b)
        return b


def _chunk_size(call: Operands) -> tuple[int, int]:
    """(images, positions) of a chunk; positions are a multiple of `state_stride` or all of them."""
    batch, length, stride = call.x.shape[0], call.length, state_stride(call.n_state)
    budget = max(1, batch * length // 8)
    if call.device.type == "cpu":
        budget = min(budget, max(1, CPU_CHUNK // (call.n_routes * call.x.shape[3])))
    images = max(1, min(batch, budget // min(stride, length)))
    return images, min(length, stride * max(1, budget // (images * stride)))


def _chunks(call: Operands) -> Iterator[tuple[slice, list[slice]]]:
    """Images, and the positions of their chunks."""
    batch, length = call.x.shape[0], call.length
    images, positions = _chunk_size(call)
    for i in range(0, batch, images):
        yield (
            slice(i, min(i + images, batch)),
            [slice(t, min(t + positions, length)) for t in range(0, length, positions)],
        )


def forward(call: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.forward`."""
    dtype, x = call.state_dtype, call.x
    b, height, width, d = x.shape
    k, n, stride = call.n_routes, call.n_state, state_stride(call.n_state)
    A, order = call.A.to(dtype), call.order()
    y = x.new_zeros((b, call.length, d), dtype=dtype)
    saved = x.new_empty((b, k, saved_every_stride(call), n, d), dtype=dtype)
    last = x.new_zeros((b, k, n, d), dtype=dtype)
    if call.initial_state is not None:
        last.copy_(call.initial_state.transpose(2, 3))

    for i, chunks in _chunks(call):
        for t in chunks:
            chunk = _Chunk(call, i, order[:, t])
            out = chunk.skip(chunk.x)
            slots = saved[i, :, t.start // stride : -(-t.stop // stride)]
            slots[:, :, 0] = last[i]
            for state in range(n):
                h = chunk.states(chunk.decay(A, state), last[i, :, state], state)
                slots[:, :, 1:, state] = h[:, :, stride - 1 : -1 : stride]
                last[i, :, state] = h[:, :, -1]
                out.addcmul_(h, chunk.C[..., state, None])
            for route in range(k):
                y[i].index_add_(1, order[route, t], out[:, route])
    return y.view(b, height, width, d), last.transpose(2, 3).contiguous(), saved


class _Sums:
    """The gradients, summed chunk by chunk; an attribute with an operand's name holds its gradient."""

    def __init__(self, call: Operands) -> None:
        x, dtype = call.x, call.state_dtype
        b, _, _, d = x.shape
        k, n, length = call.n_routes, call.n_state, call.length
        self.call = call
        self.A_values = call.A.to(dtype)
        self.W_values = None if call.delta_weight is None else call.delta_weight.to(dtype)
        self.route = torch.arange(k, device=x.device)[:, None]
        self.x = x.new_zeros((b, length, d), dtype=dtype)
        # Each position is visited once a route, so these three are written in full.
        self.delta = x.new_empty((b, length, *call.delta.shape[3:]), dtype=dtype)
        self.B = x.new_empty((b, length, k, n), dtype=dtype)
        self.C = torch.empty_like(self.B)
        self.A = torch.zeros_like(self.A_values)
        self.D = x.new_zeros(d, dtype=dtype)  # the same for every route
        self.bias = x.new_zeros((k, d), dtype=dtype)
        self.W = None if self.W_values is None else torch.zeros_like(self.W_values)
        # What the chunks processed so far, which come later on the route, add to the gradient of the state
        # at the end of the next one; after the first chunk of the route it is the initial state's gradient.
        self.carry = x.new_zeros((b, k, n, d), dtype=dtype)

    def add(self, i: slice, order: Tensor, dy: Tensor, before: Tensor) -> None:
        """Add the gradients of one chunk of images i.

        Args:
            i: The images.
            order: (k, t).
            dy: The gradient of y along the routes, (b, k, t, d).
            before: The states before the chunk, (b, k, n, d).
        """
        chunk = _Chunk(self.call, i, order)
        dx, d_delta = chunk.skip(dy), torch.zeros_like(chunk.x)
        dB, dC = torch.empty_like(chunk.B), torch.empty_like(chunk.C)
        for n in range(self.call.n_state):
            decay = chunk.decay(self.A_values, n)
            scratch = decay.clone()
            h = chunk.states(scratch, before[:, :, n], n)
            dC[..., n] = torch.linalg.vecdot(dy, h)

            scratch[:, :, :-1] = decay[:, :, 1:]
            g = dy * chunk.C[..., n, None]
            g[:, :, -1] += self.carry[i, :, n]
            recurrence_(scratch, g, reverse=True)
            self.carry[i, :, n] = decay[:, :, 0] * g[:, :, 0]

            # decay ← gradient of the exponent δA: g_t ⊙ exp(δ_t A) ⊙ h_{t-1}
            decay.mul_(g)
            decay[:, :, 1:] *= h[:, :, :-1]
            decay[:, :, 0] *= before[:, :, n]
            self.A[..., n] += torch.mul(decay, chunk.delta, out=scratch).sum((0, 2))
            d_delta.addcmul_(decay, self.A_values[:, None, :, n])

            torch.mul(g, chunk.delta, out=scratch)
            dB[..., n] = torch.linalg.vecdot(scratch, chunk.x)
            dx.addcmul_(scratch, chunk.B[..., n, None])
            d_delta.addcmul_(g.mul_(chunk.x), chunk.B[..., n, None])
        self._add_delta(i, order, chunk, d_delta)
        self.B[i][:, order, self.route] = dB
        self.C[i][:, order, self.route] = dC
        for k in range(self.call.n_routes):
            self.x[i].index_add_(1, order[k], dx[:, k])

    def _add_delta(self, i: slice, order: Tensor, chunk: _Chunk, d_delta: Tensor) -> None:
        """From the gradient of the step sizes to those of delta, its bias and its weight."""
        if self.call.delta_softplus:
            d_delta.mul_(torch.sigmoid(chunk.z))
        self.bias += d_delta.sum((0, 2))
        if self.W is not None and self.W_values is not None:
            self.W += torch.einsum("bktd,bktr->kdr", d_delta, chunk.delta_in)
            d_delta = d_delta @ self.W_values
        self.delta[i][:, order, self.route] = d_delta


def backward(grad_y: Tensor, grad_last_state: Tensor | None, call: Operands, states: Tensor) -> Gradients:
    """As `Backend.backward`: g_t = C_t dy_t + exp(δ_{t+1} A) ⊙ g_{t+1}, with g_t the gradient of h_t."""
    dtype = call.state_dtype
    _, height, width, _ = call.x.shape
    stride, order = state_stride(call.n_state), call.order()
    sums = _Sums(call)
    if grad_last_state is not None:
        sums.carry.copy_(grad_last_state.transpose(2, 3))

    for i, chunks in _chunks(call):
        sums.D += (grad_y[i].to(dtype) * call.x[i]).sum((0, 1, 2))
        for t in reversed(chunks):
            o = order[:, t]
            dy = grad_y[i, o // width, o % width].to(dtype)
            sums.add(i, o, dy, states[i, :, t.start // stride])
    image = (height, width)
    return (
        sums.x.unflatten(1, image),
        sums.delta.unflatten(1, image),
        sums.A,
        sums.B.unflatten(1, image),
        sums.C.unflatten(1, image),
        None if call.D is None else sums.D.expand(call.n_routes, -1),
        None if call.delta_bias is None else sums.bias,
        sums.W,
        None if call.initial_state is None else sums.carry.transpose(2, 3),
    )


BACKEND = Backend("chunked", "pure PyTorch on any device, parallel within chunks", forward, backward)
