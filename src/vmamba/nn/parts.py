"""Work in parts where there is nothing to differentiate, so that what lies between stays in the cache."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

HIDDEN_AT_ONCE = 2**21
"""Values between two products that stay in the cache."""
GROUP = 2**22
"""Values of the widest tensor of a group of images or rows: glibc maps each block beyond 32 MiB anew."""


def runs_as_written(x: Tensor) -> bool:
    """Whether nothing looks at the calls on a CPU tensor or changes them, so that they may be other calls."""
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and x.numel() > 0
    )


def goes_in_parts(module: nn.Module, x: Tensor) -> bool:
    """Whether no gradient is wanted, no layer draws random numbers, and no hook would see the parts."""
    return (
        not torch.is_grad_enabled()
        and not module.training
        and runs_as_written(x)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    )


def in_groups(function: Callable[[Tensor], Tensor], x: Tensor, values: int) -> Tensor:
    """function(x) for a function of images or rows, some at a time.

    Args:
        function: Takes any number of them, in dimension 0.
        x: All of them, at least one.
        values: Of the widest tensor between, for all of them.
    """
    parts = [function(part) for part in x.chunk(math.ceil(values / GROUP))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def add_by_rows(
    x: Tensor, function: Callable[..., Tensor], operands: tuple[Tensor | None, ...], width: int
) -> Tensor:
    """x + function(*operands) for a function of rows, whose widest value between is `width` wide."""
    step = max(64, HIDDEN_AT_ONCE // width)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= step:
        return x + function(*operands)
    out = torch.empty_like(rows)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        own = (None if t is None else t.reshape(-1, t.shape[-1])[part] for t in operands)
        torch.add(rows[part], function(*own), out=out[part])
    return out.view(x.shape)
