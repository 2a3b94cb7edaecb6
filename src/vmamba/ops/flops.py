"""Operation counts of the selective scan.

Sizes: b batch, h height, w width, l = h·w positions, d channels, k routes, n state size, r rank of delta.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

import vmamba.ops._operator  # noqa: F401  (registers the operator)

COUNTINGS = ("paper", "for-loop")


def scan_macs(
    shape: tuple[int, int, int, int],
    n_routes: int,
    n_state: int,
    *,
    rank: int | None = None,
    skip: bool = True,
    counting: str = "paper",
) -> float:
    """Multiply-adds of `selective_scan_2d`.

    Args:
        shape: (b, h, w, d) of x.
        n_routes: k.
        n_state: n.
        rank: r where delta comes as low-rank factors, whose product counts l·r·d a route.
        skip: Whether D is given, which counts l·d a route.
        counting: "paper", 9·l·d·n a route, as the authors' tables have it; or "for-loop", 3.5·l·d·n, the
            multiplications and additions of the recurrence itself, two to a multiply-add.

    Raises:
        ValueError: `counting` is unknown.
    """
    if counting not in COUNTINGS:
        raise ValueError(f"counting: expected one of {COUNTINGS}, got {counting!r}")
    batch, height, width, channels = shape
    per_value = (9.0 if counting == "paper" else 3.5) * n_state + skip + (rank or 0)
    return batch * height * width * channels * n_routes * per_value


@register_flop_formula(torch.ops.vmamba.selective_scan_2d)
def _forward_flops(
    x: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any, delta_weight: Any, *_: Any, **__: Any
) -> int:
    rank = None if delta_weight is None else delta_weight[2]
    return int(2 * scan_macs(tuple(x), A[0], A[2], rank=rank, skip=D is not None, counting="for-loop"))


@register_flop_formula(torch.ops.vmamba.selective_scan_2d_backward)
def _backward_flops(
    grad_y: Any, grad_last_state: Any, x: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, delta_bias: Any,
    delta_weight: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Recomputed states, their gradients, and the products with each operand: three times the forward."""
    return 3 * _forward_flops(x, delta, A, B, C, D, delta_bias, delta_weight)


def _fvcore_macs(inputs: Any, outputs: Any) -> float:
    """Multiply-adds of the operator in a trace, by the paper's counting, as fvcore counts other operators."""
    shapes: list[Any] = [value.type().sizes() if value.isCompleteTensor() else None for value in inputs[:8]]
    x, _delta, A, _B, _C, D, _bias, weight = shapes
    rank = None if weight is None else weight[2]
    return scan_macs(tuple(x), A[0], A[2], rank=rank, skip=D is not None)


FVCORE_HANDLES = {"vmamba::selective_scan_2d": _fvcore_macs}
"""For fvcore, which has no registry: `FlopCountAnalysis(model, images).set_op_handle(**FVCORE_HANDLES)`."""
