"""The selective scan (S6) over an image and over a sequence, as functions.

B batch, H height, W width, L length, D channels, K routes, N state size, R rank of delta, G groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import vmamba.ops._operator  # noqa: F401  (registers the operator)
from vmamba.ops._routes import route_codes


def selective_scan_2d(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_weight: Tensor | None = None,
    delta_softplus: bool = True,
    routes: str | Sequence[str] = "cross",
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Read an image along K routes, each a selective state-space recurrence, and sum (SS2D, section 4.2).

    For route k visiting the positions p_1 … p_L, per channel:

        δ_t = softplus(delta[p_t] + delta_bias)
        h_t = exp(δ_t A) ⊙ h_{t-1} + δ_t B[p_t] x[p_t]
        y[p_t] += C[p_t]·h_t + D x[p_t]

    Every operand is in image position, channels last, of any strides; float16, bfloat16, float32 and float64
    may be mixed. State and sums are in float32, in float64 where x is float64, under autocast too.

    Args:
        x: (B, H, W, D).
        delta: (B, H, W, K, D); with `delta_weight` the low-rank (B, H, W, K, R).
        A: (K, D, N), as a rule negative.
        B: (B, H, W, K, N).
        C: (B, H, W, K, N).
        D: (K, D), the skip.
        delta_bias: (K, D).
        delta_weight: (K, D, R): delta is formed inside as delta @ delta_weightᵀ.
        delta_softplus: Apply softplus to delta.
        routes: "cross", "unidirectional", "bidirectional", or a tuple of K of "row", "column",
            "row_reversed", "column_reversed".
        out_dtype: Type of y, rounded to once; default x's.
        backend: Engine; default the fastest of the device, see `backends`.

    Returns:
        y: (B, H, W, D), contiguous.

    Raises:
        TypeError: An operand's type is not supported.
        ValueError: A shape or device does not fit, or a route or engine is unknown.
        RuntimeError: The engine named cannot serve the call.
    """
    y, _, _ = torch.ops.vmamba.selective_scan_2d(
        x,
        delta,
        A,
        B,
        C,
        D,
        delta_bias,
        delta_weight,
        delta_softplus,
        route_codes(routes),
        None,
        out_dtype or x.dtype,
        backend,
    )
    return y


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The 1D selective scan, with Mamba's order of arguments and meaning.

    The same recurrence as `selective_scan_2d` on a sequence, through the same engines: a group is an image
    of height 1 that is read along "row".

    Args:
        u: (B, G·D, L).
        delta: (B, G·D, L).
        A: (G·D, N).
        B: (B, G, N, L), or (B, N, L) for one group.
        C: As B.
        D: (G·D,), the skip.
        z: (B, G·D, L), the gate: y is multiplied by SiLU(z).
        delta_bias: (G·D,).
        delta_softplus: Apply softplus to delta + delta_bias.
        return_last_state: Return the state after the last position too; it is differentiable.
        initial_state: (B, G·D, N), the state before the first position; default zero.
        backend: As for `selective_scan_2d`.

    Returns:
        y (B, G·D, L) in u's type, and with `return_last_state` the state (B, G·D, N) in float32
        (float64 where u is float64).

    Raises:
        As `selective_scan_2d`.
    """
    if u.ndim != 3:
        raise ValueError(f"u: expected (B, G·D, L), got shape {tuple(u.shape)}")
    batch, width, length = u.shape
    B = B.unsqueeze(1) if B.ndim == 3 else B
    C = C.unsqueeze(1) if C.ndim == 3 else C
    groups, n_state = (B.shape[1], B.shape[2]) if B.ndim == 4 else (0, 0)
    expected = {
        "delta": (delta, (batch, width, length), "(B, G·D, L)"),
        "A": (A, (width, n_state), "(G·D, N)"),
        "B": (B, (batch, groups, n_state, length), "(B, G, N, L)"),
        "C": (C, (batch, groups, n_state, length), "(B, G, N, L)"),
        "D": (D, (width,), "(G·D,)"),
        "z": (z, (batch, width, length), "(B, G·D, L)"),
        "delta_bias": (delta_bias, (width,), "(G·D,)"),
        "initial_state": (initial_state, (batch, width, n_state), "(B, G·D, N)"),
    }
    for name, (operand, shape, letters) in expected.items():
        if operand is not None and operand.shape != shape:
            raise ValueError(f"{name}: expected {letters} = {shape}, got shape {tuple(operand.shape)}")
    if groups < 1 or width % groups:
        raise ValueError(f"u: expected a number of channels that {groups} groups of B divide, got {width}")

    channels = width // groups
    ys, last_states = [], []
    for g in range(groups):
        own = slice(g * channels, (g + 1) * channels)
        y, last_state, _ = torch.ops.vmamba.selective_scan_2d(
            u[:, None, own].transpose(2, 3),  # (B, 1, L, D)
            delta[:, None, None, own].permute(0, 1, 4, 2, 3),  # (B, 1, L, 1, D)
            A[None, own],
            B[:, None, None, g].permute(0, 1, 4, 2, 3),  # (B, 1, L, 1, N)
            C[:, None, None, g].permute(0, 1, 4, 2, 3),
            None if D is None else D[None, own],
            None if delta_bias is None else delta_bias[None, own],
            None,
            delta_softplus,
            route_codes(("row",)),
            None if initial_state is None else initial_state[:, None, own],
            None,
            backend,
        )
        ys.append(y[:, 0].transpose(1, 2))
        last_states.append(last_state[:, 0])
    out = torch.cat(ys, 1)
    if z is not None:
        out = out * F.silu(z.to(out.dtype))
    out = out.to(u.dtype)
    return (out, torch.cat(last_states, 1)) if return_last_state else out
