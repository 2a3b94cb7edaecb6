"""Backend `reference`: the recurrence, position by position. The definition of correct.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes, n state size, r rank of delta.
Equations of arXiv 2401.10166, section 3, with A by zero-order hold and B by its first-order form.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.ops.backend import Backend, Gradients, state_stride
from vmamba.ops.operands import Operands


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), exact to rounding in float32 and float64 (PyTorch's default threshold of 20 is not)."""
    return F.softplus(z, threshold=40.0)


def forward(call: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """As `Backend.forward`, in plain PyTorch that can be differentiated any number of times."""
    dtype = call.state_dtype
    b, height, width, d = call.x.shape
    x, A = call.x.to(dtype).flatten(1, 2), call.A.to(dtype)
    B, C = call.B.to(dtype).flatten(1, 2), call.C.to(dtype).flatten(1, 2)

    y: list[Tensor | float] = [0.0] * call.length
    last_states, saved_states = [], []
    for k, order in enumerate(call.order().tolist()):
        state = call.initial_state
        h = x.new_zeros(b, d, call.n_state) if state is None else state[:, k].to(dtype)
        z = preactivation(call, k)
        saved = []
        for t, p in enumerate(order):
            if t % state_stride(call.n_state) == 0:
                saved.append(h)
            delta_t = softplus(z[:, p]) if call.delta_softplus else z[:, p]
            decay = torch.exp(delta_t[:, :, None] * A[k])  # (b, d, n)
            h = decay * h + (delta_t * x[:, p])[:, :, None] * B[:, p, k, None, :]
            y_t = (C[:, p, k, None, :] * h).sum(-1)
            if call.D is not None:
                y_t = y_t + call.D[k].to(dtype) * x[:, p]
            y[p] = y[p] + y_t
        last_states.append(h)
        saved_states.append(torch.stack(saved, 1).transpose(2, 3))
    merged = torch.stack(y, 1).view(b, height, width, d)  # type: ignore[arg-type]
    return merged, torch.stack(last_states, 1), torch.stack(saved_states, 1)


def preactivation(call: Operands, k: int) -> Tensor:
    """The argument of softplus on route k at every position of the image, (b, l, d)."""
    dtype = call.state_dtype
    z = call.delta[..., k, :].to(dtype).flatten(1, 2)
    if call.delta_weight is not None:
        z = z @ call.delta_weight[k].to(dtype).t()
    return z if call.delta_bias is None else z + call.delta_bias[k].to(dtype)


def backward(grad_y: Tensor, grad_last_state: Tensor | None, call: Operands, states: Tensor) -> Gradients:
    """The adjoint recurrence: g_t = C_t dy_t + exp(δ_{t+1} A) ⊙ g_{t+1}, with g_t the gradient of h_t."""
    dtype = call.state_dtype
    b, _, _, d = call.x.shape
    grad_y, x = grad_y.to(dtype).flatten(1, 2), call.x.to(dtype).flatten(1, 2)
    grad_x, grad_A = torch.zeros_like(x), call.A.new_zeros(call.A.shape, dtype=dtype)
    grad_B, grad_C = (x.new_zeros(b, call.length, call.n_routes, call.n_state) for _ in range(2))
    grad_z = x.new_zeros(b, call.length, call.n_routes, d)
    grad_initial = x.new_zeros(b, call.n_routes, d, call.n_state)
    A, B, C = call.A.to(dtype), call.B.to(dtype).flatten(1, 2), call.C.to(dtype).flatten(1, 2)
    for k, order in enumerate(call.order().tolist()):
        z = preactivation(call, k)
        delta = softplus(z) if call.delta_softplus else z
        h = [states[:, k, 0].transpose(1, 2)]  # h[t] is the state before the t-th position
        for p in order:
            decay = torch.exp(delta[:, p, :, None] * A[k])
            h.append(decay * h[-1] + (delta[:, p] * x[:, p])[:, :, None] * B[:, p, k, None, :])
        g = torch.zeros_like(h[0]) if grad_last_state is None else grad_last_state[:, k].to(dtype)
        for t in reversed(range(len(order))):
            p = order[t]
            delta_t, x_t, dy_t = delta[:, p, :, None], x[:, p, :, None], grad_y[:, p, :, None]
            B_t, C_t = B[:, p, k, None, :], C[:, p, k, None, :]
            decay = torch.exp(delta_t * A[k])
            g = g + C_t * dy_t
            grad_C[:, p, k] = (dy_t * h[t + 1]).sum(1)
            grad_B[:, p, k] = (g * delta_t * x_t).sum(1)
            grad_x[:, p] += (g * delta_t * B_t).sum(-1)
            grad_exponent = g * decay * h[t]
            grad_A[k] += (grad_exponent * delta_t).sum(0)
            grad_delta = (grad_exponent * A[k] + g * B_t * x_t).sum(-1)
            grad_z[:, p, k] = grad_delta * torch.sigmoid(z[:, p]) if call.delta_softplus else grad_delta
            g = decay * g
        grad_initial[:, k] = g
    return _collected(call, x, grad_y, grad_x, grad_z, (grad_A, grad_B, grad_C, grad_initial))


def _collected(
    call: Operands,
    x: Tensor,
    grad_y: Tensor,
    grad_x: Tensor,
    grad_z: Tensor,
    rest: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Gradients:
    """The gradients of all operands, from those of x along the routes, of z, and the rest."""
    dtype, (_, height, width, _) = call.state_dtype, call.x.shape
    grad_A, grad_B, grad_C, grad_initial = rest
    grad_D = None
    if call.D is not None:
        grad_x += grad_y * call.D.to(dtype).sum(0)
        grad_D = (grad_y * x).sum((0, 1)).expand_as(call.D)
    if call.delta_weight is None:
        grad_delta, grad_weight = grad_z, None
    else:
        grad_delta = torch.einsum("blkd,kdr->blkr", grad_z, call.delta_weight.to(dtype))
        grad_weight = torch.einsum("blkd,blkr->kdr", grad_z, call.delta.to(dtype).flatten(1, 2))
    return (
        grad_x.unflatten(1, (height, width)),
        grad_delta.unflatten(1, (height, width)),
        grad_A,
        grad_B.unflatten(1, (height, width)),
        grad_C.unflatten(1, (height, width)),
        grad_D,
        None if call.delta_bias is None else grad_z.sum((0, 1)),
        grad_weight,
        None if call.initial_state is None else grad_initial,
    )


BACKEND = Backend(
    "reference", "the recurrence, position by position: the definition of correct", forward, backward
)
