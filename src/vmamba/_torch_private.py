"""Every private interface of PyTorch that the library uses: what for, and what there is instead.

`tests/test_private.py` fails when one of them changes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# --- vmamba.ops: the operator's own autograd kernel -------------------------------------------------------
# `torch.library.register_autograd` would be the public way. Its kernel drops the tangents of forward-mode
# derivatives without a word and fails under torch.func, and it leaves no place to look for either first.


_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_KEYS_AFTER_AUTOGRAD = torch._C._after_autograd_keyset


def call_below_autograd(op: Any, keys: Any, arguments: tuple[Any, ...]) -> Any:
    """Call an operator's next kernel below autograd, from inside of its autograd kernel.

    Args:
        op: The overload, `torch.ops.<library>.<name>.default`.
        keys: The dispatch keys that the autograd kernel got (`with_keyset=True`).
        arguments: The operator's arguments.
    """
    with _BelowAutograd():
        return op.redispatch(keys & _KEYS_AFTER_AUTOGRAD, *arguments)


def is_transformed(arguments: tuple[Any, ...]) -> bool:
    """Whether an operator's autograd kernel runs for torch.func, or for a tensor with a tangent.

    Of torch.func's transforms only `grad`, `vjp`, `jvp` and what is built of them reach an autograd kernel;
    `vmap` has a rule of its own. PyTorch has no public way to ask for either.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if forward_ad._current_level < 0:  # unpack_dual would say the same, but slowly, for each tensor
        return False
    tensors = (t for t in arguments if isinstance(t, Tensor))
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
