"""Split the work into images or rows, so that intermediates stay in the cache."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

CACHED_VALUES = 2**21
"""Most values of an intermediate that stays in the cache."""
GROUP_VALUES = 2**22
"""Most values of the widest tensor of a group: glibc maps every block beyond 32 MiB anew."""


def rows_at_once(width: int) -> int:
    """How many rows of `width` values to process at a time."""
    return max(64, CACHED_VALUES // width)


def in_groups(function: Callable[[Tensor], Tensor], x: Tensor, values: int) -> Tensor:
    """function(x), computed in chunks of images or rows.

    Args:
        function: Takes any number of images or rows, in dimension 0.
        x: All of them, at least one.
        values: Size of the widest intermediate tensor for all of x.
    """
    results = [function(chunk) for chunk in x.chunk(math.ceil(values / GROUP_VALUES))]
    return results[0] if len(results) == 1 else torch.cat(results)


def add_by_rows(
    x: Tensor, function: Callable[..., Tensor], operands: tuple[Tensor | None, ...], width: int
) -> Tensor:
    """x + function(*operands), computed in chunks of rows, without gradients.

    Args:
        x: (..., c).
        function: Computes each row of its result from the same row of every operand.
        operands: (..., any width), with as many rows as x.
        width: Values a row of the function's widest intermediate tensor.
    """
    step = rows_at_once(width)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= step:
        return x + function(*operands)
    out = torch.empty_like(rows)
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        inputs = (None if t is None else t.reshape(-1, t.shape[-1])[chunk] for t in operands)
        torch.add(rows[chunk], function(*inputs), out=out[chunk])
    return out.view(x.shape)
