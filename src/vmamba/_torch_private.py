"""Every private interface of PyTorch that the library uses: what for, and what there is instead.

`tests/test_private.py` fails when one of them changes.
"""

import platform
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

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


# --- vmamba.data.loading: the workers of a DataLoader ------------------------------------------------------
# Its public face can neither name its workers nor end one that hangs: it waits for a batch forever, or raises
# after a timeout and leaves the process behind.

LOADER_TIMED_OUT = "DataLoader timed out"
"""How the message of the error begins that a loader raises when no batch came in time; it has no class."""


def loader_workers(batches: Any) -> list[Any]:
    """The worker processes behind an iterator of a `DataLoader`; none where the loader reads by itself."""
    return list(getattr(batches, "_workers", []))


def end_loader_workers(loader: Any, batches: Any) -> None:
    """End the workers of a loader's iterator, also those that hang; its next iterator starts new ones."""
    if workers := loader_workers(batches):
        batches._workers_done_event = _KillInsteadOfEvent(workers)
        batches._shutdown_workers()
    loader._iterator = None


def kill(workers: Iterable[Any]) -> None:
    """End processes, also those that hang."""
    for worker in workers:
        worker.kill()
        worker.join()


class _KillInsteadOfEvent:
    """In place of the event by which PyTorch tells workers to end.

    A worker that was killed may have held the event's lock, and whoever sets the event then waits forever.
    """

    def __init__(self, workers: Iterable[Any]) -> None:
        self._workers = list(workers)

    def set(self) -> None:
        kill(self._workers)

    def is_set(self) -> bool:
        return True


@contextmanager
def no_worker_death_handler() -> Iterator[None]:
    """Within the block an iterator of a `DataLoader` may be made without PyTorch's handler of SIGCHLD.

    The handler raises wherever the process happens to be when a worker dies, be it in the middle of a step.
    """
    # Windows has no such signal, and only the main thread can set a handler.
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


# --- vmamba.nn.fused: does anything watch, record or transform what a layer calls? -------------------------

# There is no public question for "is a global module hook registered". The dictionaries are changed in place
# and never replaced, so that they may be kept.
_GLOBAL_HOOKS = (
    _module._global_forward_hooks,
    _module._global_forward_pre_hooks,
    _module._global_backward_hooks,
    _module._global_backward_pre_hooks,
)


def has_global_hook() -> bool:
    """Whether a hook is registered for every module."""
    forward, forward_pre, backward, backward_pre = _GLOBAL_HOOKS
    return bool(forward or forward_pre or backward or backward_pre)


def is_transformed_or_recorded() -> bool:
    """Whether a transform of torch.func, a dual level, a mode or torch.jit.trace is active in this thread.

    None of these questions has a public form.
    """
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
    )


def is_legacy_batch(t: Tensor) -> bool:
    """Whether a tensor stands for many, as gradients do in `torch.autograd.grad(is_grads_batched=True)`.

    That call uses an older form of torch.func.vmap, which `is_transformed_or_recorded` misses.
    """
    return torch._C._functorch.is_legacy_batchedtensor(t)


def is_watched(attributes: dict[str, Any]) -> bool:
    """Whether a call of a module is more than its class's `forward`.

    That is: a hook of any kind is registered on it, the instance has a `forward` of its own, or its method
    `compile` was called. No public method tells.

    Args:
        attributes: The module's `__dict__`.
    """
    return bool(
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or attributes.get("_compiled_call_impl") is not None
    )


# --- vmamba.nn.fused: products and convolutions of oneDNN with an activation joined to them ----------------

HAS_ONEDNN_POINTWISE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether oneDNN's joined operators are there; they have no public form, torch.compile uses them."""


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    """x·weightᵀ + bias, then GELU if asked for."""
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], algorithm)


def onednn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    silu: bool,
) -> Tensor:
    """A convolution of (padding, stride, dilation, groups), then SiLU if asked for."""
    activation = "swish" if silu else "none"
    return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *geometry, activation, [], "")


def onednn_has_bfloat16() -> bool:
    """Whether oneDNN computes in bfloat16 on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


# --- vmamba.train: half precision on a CPU ------------------------------------------------------------------
# PyTorch tells what a CPU has instructions for of oneDNN alone, and nowhere publicly.


def cpu_computes_in(kind: str) -> bool:
    """Whether this CPU has instructions for "bf16" or "fp16", so that its products need not be emulated.

    Where PyTorch cannot tell, yes.
    """
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return True if supported is None else bool(supported())
