"""The operator's contract on its operands, shared by the real and the fake kernel.

B batch, H height, W width, D channels, K routes, N state size, R rank of delta.
"""

import torch
from torch import Tensor

from vmamba.ops._routes import ROUTES

FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def state_dtype(x: Tensor) -> torch.dtype:
    """The type of the state and of every reduction: float64 where x is float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def validate(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_weight: Tensor | None,
    routes: list[int],
    initial_state: Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Check type, device and shape of every operand.

    Raises:
        TypeError: An operand or `out_dtype` is not of a supported floating-point type.
        ValueError: An operand is on another device than x, or its shape does not fit; a route is unknown.
    """
    operands = {
        "x": x,
        "delta": delta,
        "A": A,
        "B": B,
        "C": C,
        "D": D,
        "delta_bias": delta_bias,
        "delta_weight": delta_weight,
        "initial_state": initial_state,
    }
    for name, operand in operands.items():
        if operand is None:
            continue
        if operand.dtype not in FLOAT_TYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {operand.dtype}")
        if operand.device != x.device:
            raise ValueError(f"{name}: expected on {x.device} as x is, got {operand.device}")
    if out_dtype is not None and out_dtype not in FLOAT_TYPES:
        raise TypeError(f"out_dtype: expected float16, bfloat16, float32 or float64, got {out_dtype}")

    if not routes or any(code not in range(len(ROUTES)) for code in routes):
        raise ValueError(f"routes: expected codes 0 to {len(ROUTES) - 1} of {ROUTES}, got {routes}")
    if x.ndim != 4:
        raise ValueError(f"x: expected (B, H, W, D), got shape {tuple(x.shape)}")
    if A.ndim != 3:
        raise ValueError(f"A: expected (K, D, N), got shape {tuple(A.shape)}")
    batch, height, width, channels = x.shape
    n_routes, n_state = len(routes), A.shape[2]
    if height < 1 or width < 1 or channels < 1 or n_state < 1:
        raise ValueError(
            f"x, A: expected H, W, D and N of at least 1, got x {tuple(x.shape)} and A {tuple(A.shape)}"
        )
    image = (batch, height, width, n_routes)
    if delta_weight is None:
        delta_shape, delta_letters = (*image, channels), "(B, H, W, K, D)"
    else:
        if delta_weight.ndim != 3 or delta_weight.shape[2] < 1:
            raise ValueError(f"delta_weight: expected (K, D, R), got shape {tuple(delta_weight.shape)}")
        delta_shape, delta_letters = (*image, delta_weight.shape[2]), "(B, H, W, K, R)"
    expected = {
        "delta": (delta_shape, delta_letters),
        "A": ((n_routes, channels, n_state), "(K, D, N)"),
        "B": ((*image, n_state), "(B, H, W, K, N)"),
        "C": ((*image, n_state), "(B, H, W, K, N)"),
        "D": ((n_routes, channels), "(K, D)"),
        "delta_bias": ((n_routes, channels), "(K, D)"),
        "initial_state": ((batch, n_routes, channels, n_state), "(B, K, D, N)"),
    }
    if delta_weight is not None:
        expected["delta_weight"] = ((n_routes, channels, delta_weight.shape[2]), "(K, D, R)")
    for name, (shape, letters) in expected.items():
        operand = operands[name]
        if operand is not None and tuple(operand.shape) != shape:
            raise ValueError(
                f"{name}: expected {letters} = {tuple(shape)}, got shape {tuple(operand.shape)}; "
                f"x is {tuple(x.shape)}, there are K = {n_routes} routes and N = {n_state}"
            )
