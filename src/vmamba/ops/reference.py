"""Engine `reference`: the recurrence, position by position. The definition of correct.

B batch, H height, W width, L = H·W, D channels, K routes, N state size, R rank of delta.
Equations of arXiv 2401.10166, section 3, with A by zero-order hold and B by its first-order form.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vmamba.ops._registry import Backend, Gradients, register, state_stride
from vmamba.ops._routes import route_order
from vmamba.ops._validate import state_dtype


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), exact to rounding in float32 and float64 (PyTorch's default threshold of 20 is not)."""
    return F.softplus(z, threshold=40.0)


def scan(
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
    """The operator in plain PyTorch, differentiable any number of times; returns as `Backend.forward`."""
    dtype = state_dtype(x)
    batch, height, width, channels = x.shape
    n_state = A.shape[2]
    x, A = x.to(dtype).flatten(1, 2), A.to(dtype)
    B, C = B.to(dtype).flatten(1, 2), C.to(dtype).flatten(1, 2)

    y: list[Tensor | float] = [0.0] * (height * width)
    last_states, saved_states = [], []
    for k, code in enumerate(routes):
        h = x.new_zeros(batch, channels, n_state) if initial_state is None else initial_state[:, k].to(dtype)
        z = _preactivation(delta, delta_bias, delta_weight, k, dtype)
        saved = []
        for t, p in enumerate(route_order(code, height, width).tolist()):
            if t % state_stride(n_state) == 0:
                saved.append(h)
            delta_t = softplus(z[:, p]) if delta_softplus else z[:, p]
            decay = torch.exp(delta_t[:, :, None] * A[k])  # (B, D, N)
            h = decay * h + (delta_t * x[:, p])[:, :, None] * B[:, p, k, None, :]
            y_t = (C[:, p, k, None, :] * h).sum(-1)
            if D is not None:
                y_t = y_t + D[k].to(dtype) * x[:, p]
            y[p] = y[p] + y_t
        last_states.append(h)
        saved_states.append(torch.stack(saved, 1).transpose(2, 3))
    merged = torch.stack(y, 1).view(batch, height, width, channels)  # type: ignore[arg-type]
    return merged, torch.stack(last_states, 1), torch.stack(saved_states, 1)


def _preactivation(
    delta: Tensor, delta_bias: Tensor | None, delta_weight: Tensor | None, k: int, dtype: torch.dtype
) -> Tensor:
    """What softplus takes at every position of the image, (B, L, D)."""
    z = delta[..., k, :].to(dtype).flatten(1, 2)
    if delta_weight is not None:
        z = z @ delta_weight[k].to(dtype).t()
    return z if delta_bias is None else z + delta_bias[k].to(dtype)


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
    """The adjoint recurrence: g_t = C_t dy_t + exp(δ_{t+1} A) ⊙ g_{t+1}, with g_t the gradient of h_t."""
    dtype = state_dtype(x)
    batch, height, width, channels = x.shape
    n_state = A.shape[2]
    grad_y, x, A = grad_y.to(dtype).flatten(1, 2), x.to(dtype).flatten(1, 2), A.to(dtype)
    B, C = B.to(dtype).flatten(1, 2), C.to(dtype).flatten(1, 2)
    grad_x, grad_A = torch.zeros_like(x), torch.zeros_like(A)
    grad_B, grad_C = torch.zeros_like(B), torch.zeros_like(C)
    grad_z = x.new_zeros(batch, height * width, len(routes), channels)
    grad_initial = x.new_zeros(batch, len(routes), channels, n_state)
    for k, code in enumerate(routes):
        order = route_order(code, height, width).tolist()
        z = _preactivation(delta, delta_bias, delta_weight, k, dtype)
        delta_p = softplus(z) if delta_softplus else z
        h = [states[:, k, 0].transpose(1, 2)]  # h[t] is the state before the t-th position
        for p in order:
            decay = torch.exp(delta_p[:, p, :, None] * A[k])
            h.append(decay * h[-1] + (delta_p[:, p] * x[:, p])[:, :, None] * B[:, p, k, None, :])
        g = torch.zeros_like(h[0]) if grad_last_state is None else grad_last_state[:, k].to(dtype)
        for t in reversed(range(len(order))):
            p = order[t]
            delta_t, x_t, dy_t = delta_p[:, p, :, None], x[:, p, :, None], grad_y[:, p, :, None]
            B_t, C_t = B[:, p, k, None, :], C[:, p, k, None, :]
            decay = torch.exp(delta_t * A[k])
            g = g + C_t * dy_t
            grad_C[:, p, k] = (dy_t * h[t + 1]).sum(1)
            grad_B[:, p, k] = (g * delta_t * x_t).sum(1)
            grad_x[:, p] += (g * delta_t * B_t).sum(-1)
            grad_exponent = g * decay * h[t]
            grad_A[k] += (grad_exponent * delta_t).sum(0)
            grad_delta = (grad_exponent * A[k] + g * B_t * x_t).sum(-1)
            grad_z[:, p, k] = grad_delta * torch.sigmoid(z[:, p]) if delta_softplus else grad_delta
            g = decay * g
        grad_initial[:, k] = g

    grad_D = None
    if D is not None:
        grad_x += grad_y * D.to(dtype).sum(0)
        grad_D = (grad_y * x).sum((0, 1)).expand_as(D)
    if delta_weight is None:
        grad_delta, grad_weight = grad_z, None
    else:
        grad_delta = torch.einsum("blkd,kdr->blkr", grad_z, delta_weight.to(dtype))
        grad_weight = torch.einsum("blkd,blkr->kdr", grad_z, delta.to(dtype).flatten(1, 2))
    return (
        grad_x.view(batch, height, width, channels),
        grad_delta.unflatten(1, (height, width)),
        grad_A,
        grad_B.unflatten(1, (height, width)),
        grad_C.unflatten(1, (height, width)),
        grad_D,
        None if delta_bias is None else grad_z.sum((0, 1)),
        grad_weight,
        None if initial_state is None else grad_initial,
    )


register(
    Backend("reference", "the recurrence, position by position: the definition of correct", scan, backward)
)
